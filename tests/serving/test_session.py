"""What is found out before Ray is asked, and what its reports come down to."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from moe_dist.errors import CheckpointError, MissingInputError
from moe_dist.serving.session import (
    Endpoint,
    ServingSession,
    _last_line,
    model_version,
    reload_running,
    until_stopped,
)
from moe_dist.serving.settings import ServingSettings
from tests.serving.tiny_service import save_tiny


def settings(directory: Path) -> ServingSettings:
    return ServingSettings.of(directory=str(directory))


def test_a_directory_that_is_no_model_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started: list[str] = []
    monkeypatch.setattr(
        "moe_dist.workers.ray_session.RaySession.connect", lambda self: started.append("ray")
    )
    for place in (tmp_path / "none", tmp_path):
        with (
            pytest.raises(CheckpointError, match=str(place)),
            ServingSession(settings(place), Endpoint(), lambda line: None),
        ):
            pass
    assert not started


def test_reloading_needs_to_know_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(MissingInputError, match="no RAY_ADDRESS"):
        reload_running(settings(tmp_path))


def test_the_version_changes_with_the_files(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    first = model_version(str(directory))
    save_tiny(directory)
    assert model_version(str(directory)) == first and len(first) == 12
    save_tiny(directory, seed=1)
    assert model_version(str(directory)) != first
    assert model_version(str(tmp_path / "none")) == ""


def test_signals_come_one_by_one_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with until_stopped() as wait:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert [wait(), wait(), wait()] == [True, True, False]
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert wait() is False
    assert signal.getsignal(signal.SIGTERM) is before


def test_of_a_replicas_report_only_its_own_error_is_said() -> None:
    report = (
        "Deploying application moe-dist failed: ray::ServeReplica (pid=3)\n"
        "Traceback (most recent call last):\n"
        '  File "x.py", line 3, in load\n'
        "moe_dist.errors.ConversionError: there is no form fast-fp32: 'fast' is not one of eager\n"
        "  Remedy: write for example eager-fp32\n"
    )
    said = _last_line(RuntimeError(report))
    assert said == "there is no form fast-fp32: 'fast' is not one of eager"
    assert _last_line(RuntimeError("one\ntwo\n")) == "two"
    assert _last_line(RuntimeError()) == "RuntimeError"
    assert _last_line(CheckpointError("damaged", remedy="copy again")) == "damaged"
