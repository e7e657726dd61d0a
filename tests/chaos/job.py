"""The job that the chaos runs submit: ours, watched, and stopped at marks.

It leaves production code as it is and puts hooks around it in the worker: on the model's modules,
around a step, and around `fsync`, through which every file of a checkpoint passes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moe_dist.jobs import train_job
from moe_dist.jobs.distill import DistillJob
from moe_dist.training import loop
from moe_dist.training.collectives import own_rank
from tests.chaos.marks import DIRECTORY_VARIABLE, Mark, MarkBoard
from tests.chaos.trace import TraceWriter

UNFINISHED = re.compile(r"/\.unfinished-step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class WatchedDistillJob(DistillJob):
    """A distillation with marks and a trace in a directory that all workers share."""

    marks: str = field(default_factory=lambda: os.environ[DIRECTORY_VARIABLE])

    def run(self) -> dict[str, Any]:
        with _watched(Path(self.marks)):
            return super().run()


@contextmanager
def _watched(directory: Path) -> Iterator[None]:
    rank = own_rank()
    address = _own_address()
    board = MarkBoard(directory)
    stops = _Stops(board, [mark for mark in board.marks() if mark.rank == rank], address)
    trace = TraceWriter(directory, rank=rank, address=address)
    with ExitStack() as stack:
        stack.enter_context(patch.object(train_job, "train", stops.on_model(train_job.train)))
        stack.enter_context(
            patch.object(loop, "_take_step", trace.of_steps(stops.before_step(loop._take_step)))
        )
        stack.enter_context(patch.object(os, "fsync", stops.on_flush(os.fsync)))
        yield


class _Stops:
    """Waits at this rank's marks."""

    def __init__(self, board: MarkBoard, marks: list[Mark], address: str) -> None:
        self._board = board
        self._marks = marks
        self._address = address
        self._step = 0
        self._flushed: dict[int, int] = {}

    def at(self, point: str, step: int, part: int = 0) -> None:
        for mark in self._marks:
            if (mark.point, mark.step, mark.part) == (point, step, part):
                self._board.wait_here(mark, self._address)

    def before_step(self, take_step: Callable[..., None]) -> Callable[..., None]:
        def taking(*args: Any, step: int, **options: Any) -> None:
            self._step = step + 1
            self.at("step", self._step)
            take_step(*args, step=step, **options)

        return taking

    def on_model(self, train: Callable[..., Any]) -> Callable[..., Any]:
        def training(engine: Any, *args: Any, **options: Any) -> Any:
            # The last layer: behind other experts' exchanges in both directions.
            module = list(_encoder_layers(engine.module))[-1]
            module.register_forward_pre_hook(lambda *_: self._in_pass("forward", module))
            module.register_full_backward_pre_hook(lambda *_: self._in_pass("backward", module))
            return train(engine, *args, **options)

        return training

    def on_flush(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def flushing(descriptor: int) -> None:
            found = UNFINISHED.search(os.readlink(f"/proc/self/fd/{descriptor}"))
            if found:
                step = int(found.group(1))
                self._flushed[step] = part = self._flushed.get(step, 0) + 1
                self.at("checkpoint", step, part)
            fsync(descriptor)

        return flushing

    def _in_pass(self, point: str, module: Any) -> None:
        if module.training:
            self.at(point, self._step)


def _encoder_layers(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if type(module).__name__ == "BertLayer")


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else "here"
