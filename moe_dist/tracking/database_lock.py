"""Turns of the processes that write to one sqlite store.

sqlite lets one process write at a time, and makes the others try again until they give up with
"database is locked". A lock file beside the database lets them stand in line instead.
"""

from __future__ import annotations

import errno
import fcntl
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MAX_WAIT_S = 60.0
"""A process that was stopped within its turn holds up the others no longer than this."""
_POLL_S = 0.01


class Turns:
    """The line in front of a database, across processes and threads; not to be nested.

    Args:
        database: the database's file; with None, as for a server, nobody waits.
    """

    def __init__(self, database: Path | None) -> None:
        self._lock = (
            None if database is None else database.with_name(f".{database.name}.turns").absolute()
        )

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for a turn, and end it with the block.

        Yields:
            Nothing.
        """
        if self._lock is None:
            yield
            return
        try:
            stream = self._lock.open("w", encoding="utf-8")
        except OSError:  # The database may be writable where its directory is not.
            yield
            return
        with stream:
            _wait(stream)
            # Closing the file ends the turn.
            yield


def _wait(stream: IO[str]) -> None:
    deadline = time.monotonic() + MAX_WAIT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as fault:
            if fault.errno not in (errno.EAGAIN, errno.EACCES):
                return  # Some shared file systems know no locks; sqlite's own must do.
        time.sleep(random.uniform(_POLL_S, 2 * _POLL_S))
