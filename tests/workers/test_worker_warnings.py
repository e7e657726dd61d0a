"""Warnings of a worker reach the driver's log once, in order and whole."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from moe_dist.workers.records import Records
from moe_dist.workers.worker_warnings import WARNINGS_NAME, followed_warnings, forwarded_warnings

logger = logging.getLogger("moe_dist.training.somewhere")


def test_only_warnings_are_written(tmp_path: Path) -> None:
    with forwarded_warnings(tmp_path):
        logger.info("nothing to see")
        logger.warning("%d workers", 3)
    logger.warning("after the job")
    assert (tmp_path / WARNINGS_NAME).read_text() == (
        '{"logger": "moe_dist.training.somewhere", "message": "3 workers"}\n'
    )


def test_what_is_written_while_a_job_runs_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = '{"logger": "moe_dist.x", "message": "%s"}\n'
    with followed_warnings(Records(tmp_path)), (tmp_path / WARNINGS_NAME).open("w") as stream:
        stream.write(line % "first" + line[:20])
        stream.flush()
        deadline = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
        assert caplog.messages == ["first"]
        stream.write((line % "second")[20:])
    assert caplog.messages == ["first", "second"]
    assert {record.name for record in caplog.records} == {"moe_dist.x"}


def test_a_job_without_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with followed_warnings(Records(tmp_path)):
        pass
    assert not caplog.messages
