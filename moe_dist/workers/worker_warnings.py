"""Brings the warnings of a job's first rank to the process that started the job.

Ray keeps a worker's log on the worker's node, where its user does not look. So rank 0 appends its
warnings to a file in the job's directory, and the driver gives them to its own logger.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_dist.background import in_background
from moe_dist.errors import StorageError
from moe_dist.workers.records import Records

WARNINGS_NAME = "warnings.jsonl"
_LIBRARY = "moe_dist"


@contextmanager
def forwarded_warnings(records: Path) -> Iterator[None]:
    """Write this process's warnings to the job's directory."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = json.dumps({"logger": record.name, "message": record.getMessage()})
            try:
                with (records / WARNINGS_NAME).open("a", encoding="utf-8") as stream:
                    stream.write(line + "\n")
            except OSError:  # A full disk has its own error; this one must not hide it.
                self.handleError(record)

    handler = Handler(level=logging.WARNING)
    library = logging.getLogger(_LIBRARY)
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)


@contextmanager
def followed_warnings(records: Records) -> Iterator[None]:
    """Log what `forwarded_warnings` writes in another process, the last before the end."""

    def follow(over: threading.Event) -> None:
        offset, is_last = 0, False
        while not is_last:
            is_last = over.wait(records.look_every_s)
            with suppress(StorageError):  # What does not come now comes with the next look.
                records.pull()
            offset = _log_from(records.directory / WARNINGS_NAME, offset)

    with in_background(follow, "job-warnings"):
        yield


def _log_from(path: Path, offset: int) -> int:
    """Log the whole lines from an offset on; returns the next offset."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            content = stream.read()
    except OSError:
        return offset
    whole = content[: content.rfind(b"\n") + 1]
    for line in whole.splitlines():
        note = json.loads(line)
        logging.getLogger(note["logger"]).warning("%s", note["message"])
    return offset + len(whole)
