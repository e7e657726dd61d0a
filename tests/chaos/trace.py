"""What each worker did: the samples of every step, in the order in which it took them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """The steps of one process.

    Args:
        rank: its rank.
        pid: its process id.
        address: its node's address.
        began: Unix time in s.
        samples: ids of its part of each step that it finished, in order.
        times: when it finished each, Unix time in s.
    """

    rank: int
    pid: int
    address: str
    began: float
    samples: dict[int, list[int]] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """The steps that it finished."""
        return list(self.samples)


class TraceWriter:
    """Writes one process's file, a line for each step.

    Args:
        directory: where the files of all processes lie.
        rank: of this one.
        address: of its node.
    """

    def __init__(self, directory: Path, *, rank: int, address: str) -> None:
        self._path = directory / f"trace-{rank}-{os.getpid()}-{time.time_ns()}.jsonl"
        self._append({"rank": rank, "pid": os.getpid(), "address": address, "time": time.time()})

    def of_steps(self, take_step: Callable[..., None]) -> Callable[..., None]:
        """Wrap the function that takes a step, to note each that is done."""

        def taking(engine: Any, batch: Any, *args: Any, step: int, **options: Any) -> None:
            take_step(engine, batch, *args, step=step, **options)
            ids = [int(sample) for sample in batch.sample_ids]
            self._append({"step": step + 1, "samples": ids, "time": time.time()})

        return taking

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def read_trace(directory: Path) -> list[Attempt]:
    """Read what all processes did.

    Args:
        directory: as given to the writers.

    Returns:
        One entry for each process, in the order in which they began.
    """
    found = [_read(path) for path in sorted(directory.glob("trace-*.jsonl"))]
    return sorted((attempt for attempt in found if attempt), key=lambda attempt: attempt.began)


def _read(path: Path) -> Attempt | None:
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # the process was killed while it wrote
    if not entries:
        return None
    head, *steps = entries
    return Attempt(
        head["rank"],
        head["pid"],
        head["address"],
        head["time"],
        {entry["step"]: entry["samples"] for entry in steps},
        {entry["step"]: entry["time"] for entry in steps},
    )
