"""Points at which a worker stops and waits to be hurt.

A mark is a moment of training: a step, a rank, and where in the step. The process that reaches it
says so in a file and waits until another file lets it go on, or until it is killed. So a fault hits
the very instruction that its seed chose, however fast the machine is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DIRECTORY_VARIABLE = "MDT_CHAOS_DIRECTORY"
POINTS = ("forward", "backward", "step", "checkpoint")
PLAN_NAME = "marks.json"
POLL_S = 0.02


@dataclass(frozen=True)
class Mark:
    """A moment of training.

    Args:
        name: unique within a run; a mark is reached once, also over restarts.
        step: number of the step that is being taken, from 1; of a checkpoint the step in its name.
        rank: who stops there.
        point: one of `POINTS`; `step` is before the step begins.
        part: for a checkpoint, after how many of its files.
    """

    name: str
    step: int
    rank: int
    point: str
    part: int = 0


@dataclass(frozen=True)
class Reached:
    """A process that waits at a mark."""

    mark: Mark
    pid: int
    address: str
    time: float


class MarkBoard:
    """The files through which workers and the tests speak of marks.

    Args:
        directory: shared by all of them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def plan(self, marks: Iterable[Mark]) -> None:
        """Set the marks of a run, before it starts."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(mark) for mark in marks])
        (self.directory / PLAN_NAME).write_text(text, encoding="utf-8")

    def marks(self) -> list[Mark]:
        """Return the marks of the run."""
        path = self.directory / PLAN_NAME
        return [Mark(**entry) for entry in json.loads(path.read_text())] if path.exists() else []

    def wait_here(self, mark: Mark, address: str) -> None:
        """Stop the calling process at a mark, unless it was reached before."""
        reached, release = self._path(mark, "reached"), self._path(mark, "release")
        entry = {"pid": os.getpid(), "address": address, "time": time.time()}
        beside = reached.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(entry), encoding="utf-8")
        try:
            os.link(beside, reached)
        except FileExistsError:
            return
        finally:
            beside.unlink()
        while not release.exists():
            time.sleep(POLL_S)

    def reached(self, mark: Mark) -> Reached | None:
        """Return who waits at a mark, or waited there; None if nobody did."""
        path = self._path(mark, "reached")
        if not path.exists():
            return None
        entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Reached(mark, entry["pid"], entry["address"], entry["time"])

    def release(self, mark: Mark) -> None:
        """Let the process at a mark go on."""
        self._path(mark, "release").touch()

    def _path(self, mark: Mark, suffix: str) -> Path:
        return self.directory / f"{mark.name}.{suffix}"
