"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_dist.distributed.agreement import on_rank_zero
from moe_dist.distributed.checkpoint_files import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    RNG_FILE,
    list_checkpoints,
    prune_checkpoints,
    step_directory,
    step_of,
    write_checkpoint,
)
from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.expert_placement import Order
from moe_dist.distributed.gathering import gather_model, gather_moments, gather_rng
from moe_dist.distributed.host_memory import HostBuffers
from moe_dist.distributed.integrity import (
    Digests,
    check_gathered,
    gather_digests,
    held_digests,
    held_orders,
    stored_digests,
)
from moe_dist.distributed.manifest import FORMAT_VERSION
from moe_dist.errors import CheckpointError, MoeDistError
from moe_dist.moe.digests import numbered

logger = logging.getLogger(__name__)

# How long a run that ends with an error still waits for the checkpoint that is being written.
SALVAGE_TIMEOUT_S = 120.0


class CheckpointWriter:
    """Writes a run's checkpoints in a thread of rank 0; use it in a `with` statement.

    Training stands still while weights and moments are gathered into rank 0's host memory, which
    holds one copy of them from then on. A thread hashes, writes, renames and prunes. One write at
    most is under way: the next checkpoint waits for it. A write that fails is raised, on every
    rank, by the next `save` or `wait`, or at the end of the `with` block. If the block ends with
    an error, rank 0 still gives the write that is under way `SALVAGE_TIMEOUT_S`.

    Args:
        directory: holds the checkpoints of one run; on storage that all ranks see.
        engine: whose model and optimizer are saved.
        keep: how many checkpoints stay; with one there is none to fall back on if it is damaged.
        resumed_from: the step that training goes on from, if it does; checkpoints of later steps
            that are there belong to a trajectory that was left, and go when the first is written.
        on_written: called in the thread with each checkpoint's directory when it is complete,
            before older ones are removed; its error counts as a failed write.
    """

    def __init__(
        self,
        directory: Path,
        engine: TrainEngine,
        *,
        keep: int = 2,
        resumed_from: int | None = None,
        on_written: Callable[[Path], None] | None = None,
    ) -> None:
        self.write_s: float | None = None
        """Seconds that the last finished write took; None before, and on other ranks."""
        self._directory = Path(directory)
        self._engine = engine
        self._keep = keep
        self._resumed_from = resumed_from
        self._on_written = on_written
        pinned = engine.device.type == "cuda"
        self._model_buffers = HostBuffers(pinned=pinned)
        self._moment_buffers = HostBuffers(pinned=pinned)
        self._abandoned: set[int] | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> CheckpointWriter:
        """Begin; nothing is written yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the last write, together or, after an error, each rank for itself."""
        if fault is None:
            self.wait()
        else:
            self._salvage()

    def save(self, step: int, state: dict[str, Any]) -> float:
        """Take a checkpoint of this moment and begin to write it; collective.

        Args:
            step: number of the step, for the name.
            state: the caller's own plain values (epoch, position, ...), returned by the load.

        Returns:
            Seconds for which training stood still, the wait for the write before included.

        Raises:
            CheckpointError: on every rank, if the write before this one failed.
        """
        started = time.perf_counter()
        self.wait()
        engine = self._engine
        # Only the first expert group's weights are gathered.
        mine = held_digests(engine.module) if engine.rank < engine.ep_size else {}
        held = gather_digests(engine, mine)[: engine.ep_size]
        orders = held_orders(engine.module)
        tensors = {
            MODEL_FILE: gather_model(engine, self._model_buffers),
            OPTIMIZER_FILE: gather_moments(engine, self._moment_buffers),
            RNG_FILE: gather_rng(engine),
        }
        if engine.rank == 0:
            sizes = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "optimizer_steps": engine.steps_done,
                "world_size": engine.world_size,
                "ep_size": engine.ep_size,
                "zero_stage": engine.zero_stage,
                "state": state,
            }
            self._start(lambda: self._write(step, tensors, sizes, held, orders))
        return time.perf_counter() - started

    def wait(self) -> float:
        """Wait until nothing is being written, and return the seconds; collective.

        If the write failed, it is a CheckpointError on every rank.
        """
        started = time.perf_counter()
        on_rank_zero(self._engine, self._finish)
        return time.perf_counter() - started

    def _start(self, write: Callable[[], None]) -> None:
        def run() -> None:
            started = time.perf_counter()
            try:
                write()
            except BaseException as error:  # Raised where training meets it next.
                self._failure = error
            self.write_s = time.perf_counter() - started

        # A daemon, so that a disk that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _finish(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _salvage(self) -> None:
        if self._thread is None:
            return
        self._thread.join(SALVAGE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning(
                "the checkpoint that was being written is given up after %.0f s; "
                "older ones are untouched",
                SALVAGE_TIMEOUT_S,
            )
        elif self._failure is not None:
            logger.warning("the last checkpoint was not written: %s", self._failure)

    def _write(
        self,
        step: int,
        tensors: dict[str, dict[str, Any]],
        sizes: dict[str, Any],
        held: list[Digests],
        orders: dict[str, Order],
    ) -> None:
        path = step_directory(self._directory, step)
        stored = stored_digests(tensors[MODEL_FILE], list(held[0]))
        check_gathered(stored, held, orders)
        if self._abandoned is None:
            self._abandoned = self._steps_left_behind()
        write_checkpoint(path, tensors, sizes, numbered(stored))
        self._abandoned.discard(step)
        if self._on_written is not None:
            _call(self._on_written, path)
        prune_checkpoints(self._directory, step, keep=self._keep, abandoned=self._abandoned)

    def _steps_left_behind(self) -> set[int]:
        if self._resumed_from is None:
            return set()
        steps = {step_of(path) or 0 for path in list_checkpoints(self._directory)}
        return {step for step in steps if step > self._resumed_from}


def _call(on_written: Callable[[Path], None], path: Path) -> None:
    try:
        on_written(path)
    except MoeDistError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} was written, but what had to follow failed: {type(error).__name__}: {error}",
            remedy="mend that, then start the same command again; it continues from there",
        ) from error
