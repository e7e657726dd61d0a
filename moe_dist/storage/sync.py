"""Copies what changes, every few seconds, from a thread that outages do not end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moe_dist.background import in_background
from moe_dist.errors import StorageError

logger = logging.getLogger(__name__)


class Sync:
    """Copying that is tried again after an outage, which is said once.

    Args:
        copy: brings the other side up to date with what has changed since its last call.
    """

    def __init__(self, copy: Callable[[], object]) -> None:
        self._copy = copy
        self._is_failing = False
        # What one thread read earlier must not arrive after what another has read since.
        self._lock = threading.Lock()

    def attempt(self) -> None:
        """Copy now; what fails is tried again the next time."""
        with self._lock:
            try:
                self._copy()
                self._is_failing = False
            except (StorageError, OSError) as error:
                if not self._is_failing:
                    _warn(error, "trying again")
                self._is_failing = True

    @contextmanager
    def every(
        self,
        interval_s: float,
        name: str,
        *,
        finish: Callable[[], object] | None = None,
        salvage: Callable[[], object] | None = None,
    ) -> Iterator[None]:
        """Copy from a thread while a `with` block lasts, and a last time when it is over.

        Args:
            interval_s: seconds between two copies.
            name: of the thread.
            finish: the last copy of a block that ended well; without it, a failure is a warning.
            salvage: the last copy of a block that an error ended, which is the one to show: a
                failure of the copy is a warning. The default copies as before.

        Yields:
            While the thread runs.

        Raises:
            StorageError: if `finish` does.
        """

        def follow(over: threading.Event) -> None:
            while not over.wait(interval_s):
                self.attempt()

        try:
            with in_background(follow, name):
                yield
        except BaseException:
            self._copy_last(salvage or self._copy)
            raise
        if finish is not None:
            finish()
        else:
            self._copy_last(self._copy)

    def _copy_last(self, copy: Callable[[], object]) -> None:
        try:
            copy()
        except (StorageError, OSError) as error:
            _warn(error, "what was written last is not there")


def _warn(error: StorageError | OSError, outcome: str) -> None:
    logger.warning("%s; %s", str(error).splitlines()[0], outcome)
