"""What is left of a job's error when the disk is full."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import CheckpointError, DataError
from moe_dist.workers.job_errors import (
    ROOM_NAME,
    STOPPED_NAME,
    keep_room,
    last_line,
    note_stop,
    read_stop,
)


def test_the_last_word_takes_the_room_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def on_a_full_disk(path: Path, *args: Any, **options: Any) -> int:
        if (tmp_path / ROOM_NAME).exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *args, **options)

    keep_room(tmp_path)
    assert (tmp_path / ROOM_NAME).stat().st_size > 1 << 15
    monkeypatch.setattr(Path, "write_text", on_a_full_disk)
    note_stop(tmp_path, CheckpointError("the disk is full", remedy="free space"))
    error = read_stop(tmp_path)
    assert isinstance(error, CheckpointError) and error.remedy == "free space"
    assert [path.name for path in tmp_path.iterdir()] == ["stopped.json"]


def test_the_last_word_holds_no_secret(tmp_path: Path) -> None:
    note_stop(tmp_path, DataError("no /d?token=planted", remedy="see http://ann:planted@host"))
    assert "planted" not in (tmp_path / STOPPED_NAME).read_text()
    error = read_stop(tmp_path)
    assert isinstance(error, DataError) and error.message == "no /d?token=***"


def test_an_error_is_told_by_the_line_that_says_what_happened() -> None:
    assert last_line(CheckpointError("the disk is full", remedy="free space")) == "the disk is full"
    assert (
        last_line(RuntimeError("a trace\nconnection closed")) == "RuntimeError: connection closed"
    )
