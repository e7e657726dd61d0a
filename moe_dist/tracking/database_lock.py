"""The lock of the processes that write to one sqlite store.

sqlite lets one process write at a time, and makes the others try again until they give up with
"database is locked". A lock file beside the database lets them wait for each other instead.
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
"""A process that was stopped while it held the lock holds up the others no longer than this."""
_POLL_S = 0.01


class DatabaseLock:
    """Lets one writer at a database, across processes and threads; not to be nested.

    Args:
        database: the database's file; with None, as for a server, nobody waits.
    """

    def __init__(self, database: Path | None) -> None:
        self._path = (
            None if database is None else database.with_name(f".{database.name}.lock").absolute()
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock, and give it back at the block's end."""
        if self._path is None:
            yield
            return
        try:
            stream = self._path.open("w", encoding="utf-8")
        except OSError:  # The database may be writable where its directory is not.
            yield
            return
        with stream:
            _wait(stream)
            # Closing the file gives the lock back.
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
