"""Where this process is: its phase, step and collective, marked at the call sites.

A process has one position at a time, whichever thread asks, so there is one `here`. A mark costs
one or two microseconds; the watchdog (`moe_dist.distributed.watchdog`) reads it from its thread.

    enter_phase("evaluation")
    begin_step(7)
    with collective("gradient reduction"):
        dist.all_reduce(...)

With NCCL such a call returns as soon as the GPU was told of it, and the host waits somewhere else
for what it gives. So what the GPU has not got through yet counts as where the process is
(`follow_device`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

START_UP = "start-up"
LOAD_CHECKPOINT = "loading the checkpoint"
FIRST_STEP = "first step"
TRAINING = "training"
FINISHED = "the end of the job"


class Position(NamedTuple):
    """Where a process is, and since when on its own monotonic clock.

    Args:
        phase: what it does: `training`, `evaluation`, `checkpoint`...
        step: the optimizer step, counted from 1; 0 before the first.
        collective: the collective that it waits in; empty while it computes.
        number: collectives begun since the step or phase began.
        since: monotonic time of the last mark, in seconds.
    """

    phase: str = START_UP
    step: int = 0
    collective: str = ""
    number: int = 0
    since: float = 0.0

    def __str__(self) -> str:
        where = f"{self.phase}, step {self.step}" if self.step else self.phase
        return f"{self.collective} (number {self.number}) of {where}" if self.collective else where


class _Here:
    """The position, replaced whole by each mark, so that readers need no lock."""

    def __init__(self) -> None:
        self.position = Position(since=time.monotonic())
        self.on_phase: Callable[[str], None] | None = None
        self.mark: Callable[[], Callable[[], bool]] | None = None
        self._queued: deque[tuple[str, int, Callable[[], bool]]] = deque()
        self._lock = threading.Lock()

    def queue(self, name: str, number: int) -> None:
        """Note a collective that the GPU was told of."""
        if self.mark is not None:
            is_done = self.mark()
            self.oldest()
            self._queued.append((name, number, is_done))

    def oldest(self) -> tuple[str, int] | None:
        """Name the first collective that the GPU has not got through."""
        with self._lock:
            while self._queued:
                name, number, is_done = self._queued[0]
                if not is_done():
                    return name, number
                self._queued.popleft()
        return None

    def forget(self) -> None:
        with self._lock:
            self._queued.clear()


_here = _Here()


def current_position() -> Position:
    """Return where this process is: the position of the last mark.

    While it computes, or waits for its GPU, with the collective that the GPU is in, if any.
    """
    position = _here.position
    oldest = None if position.collective else _here.oldest()
    if oldest is None:
        return position
    return position._replace(collective=oldest[0], number=oldest[1])


def enter_phase(phase: str) -> None:
    """Mark that another kind of work begins, named as messages show it."""
    _here.position = Position(phase, _here.position.step, since=time.monotonic())
    if _here.on_phase is not None:
        _here.on_phase(phase)


def begin_step(step: int) -> None:
    """Mark that an optimizer step begins, counted from 1."""
    _here.position = Position(_here.position.phase, step, since=time.monotonic())


def note_progress() -> None:
    """Mark that the present work advances, as an evaluation does with each batch."""
    _here.position = _here.position._replace(collective="", since=time.monotonic())


def advancing(items: Iterable[T]) -> Iterator[T]:
    """Mark progress with each item that is taken."""
    for item in items:
        note_progress()
        yield item


def follow_phases(on_phase: Callable[[str], None] | None) -> None:
    """Begin anew at the start-up phase, and have later phases told.

    `on_phase` is called in the thread that enters the phase; None tells nobody.
    """
    _here.position = Position(since=time.monotonic())
    _here.on_phase = on_phase
    _here.forget()


def follow_device(mark: Callable[[], Callable[[], bool]] | None) -> None:
    """Follow collectives until the GPU is through with them.

    `mark` is called at the end of each, and gives a function that tells whether the GPU has got
    there (`moe_dist.distributed.device_queue`); None believes each done when its call returns.
    """
    _here.mark = mark
    _here.forget()


def mark_calls(owner: Any, method: str, name: str) -> None:
    """Mark a method of somebody else's object as a collective, named as messages show it."""
    unmarked = getattr(owner, method)

    @wraps(unmarked)
    def marked(*args: Any, **options: Any) -> Any:
        with collective(name):
            return unmarked(*args, **options)

    setattr(owner, method, marked)


class collective:
    """Mark a collective for as long as the `with` block lasts.

    Args:
        name: as messages show it.
    """

    __slots__ = ("_before", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        """Wait in the collective from now on."""
        before = self._before = _here.position
        _here.position = Position(
            before.phase, before.step, self._name, before.number + 1, time.monotonic()
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Go on with what was done before; a failed collective stays marked, for the message."""
        if kind is None:
            left, before = _here.position, self._before
            _here.queue(self._name, left.number)
            _here.position = Position(
                before.phase, before.step, before.collective, left.number, time.monotonic()
            )
