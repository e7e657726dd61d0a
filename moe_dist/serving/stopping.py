"""Signals of a server: load anew, stop, and stop at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def until_stopped() -> Iterator[Callable[[], bool]]:
    """Give a function that waits for a signal: True for SIGHUP, False for SIGTERM and ctrl-C.

    A SIGHUP that comes while nobody waits counts for the next time; SIGTERM and ctrl-C end what is
    done then by a KeyboardInterrupt, and once more if they come again. Handlers are those from
    before when the block ends.
    """
    wake = threading.Event()
    reloads: list[int] = []
    waiting, stopped = False, False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if number == signal.SIGHUP:
            reloads.append(number)
        elif waiting and not stopped:
            stopped = True
        else:
            raise KeyboardInterrupt("requests under way may be without an answer")
        wake.set()

    def wait() -> bool:
        nonlocal waiting
        waiting = True
        try:
            while not stopped and not reloads:
                # Short, since a signal is handled between two steps of the main thread.
                wake.wait(0.5)
                wake.clear()
        finally:
            waiting = False
        if stopped:
            return False
        reloads.pop(0)
        return True

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
