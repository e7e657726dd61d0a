"""Stores that cannot be used, are silent, or go away and come back."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moe_dist.errors import TrackingError
from moe_dist.metric_log import MetricLog
from moe_dist.tracking import build_tracker
from moe_dist.tracking.connection import usable
from moe_dist.tracking.sender import Sender
from tests.tracking.servers import Server, points

mlflow = pytest.importorskip("mlflow")
variables = pytest.importorskip("mlflow.environment_variables")


@pytest.mark.parametrize(
    "uri",
    [
        "http://ann:pw@127.0.0.1:9",
        "http://no-such-host.invalid:5000",
        "file:///tmp/mlruns",
        "mlruns",
        "sqlite:////proc/nowhere/mlflow.db",
    ],
)
def test_unusable_store_is_one_error_at_once(uri: str) -> None:
    import mlflow.tracking  # noqa: F401  (its import is no part of the wait)

    started = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        build_tracker(uri)
    assert time.monotonic() - started < 8
    assert "Remedy" in str(caught.value) and "pw" not in str(caught.value)


def test_silent_server_is_one_error_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started = time.monotonic()
        with pytest.raises(TrackingError):
            build_tracker(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert time.monotonic() - started < 10


def test_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(TrackingError, match=r"mlflow\.db cannot be opened"):
        build_tracker(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.parametrize("given", [{}, {"TIMEOUT": "20"}, {"TIMEOUT": "120", "MAX_RETRIES": "3"}])
def test_timeouts_of_the_user_are_kept(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name in ("TIMEOUT", "MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "")  # so that it is restored
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    for name, value in given.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    for _ in range(2):
        with usable("http://127.0.0.1:9"):
            assert variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == int(given.get("TIMEOUT", 4))
        assert variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == int(given.get("TIMEOUT", 20))
        assert variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == int(given.get("MAX_RETRIES", 0))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    directory = tmp_path / "server"
    directory.mkdir()
    instance = Server(directory)
    yield instance
    instance.stop()


@pytest.mark.parametrize("num_refusals", [0, 2])
def test_end_of_a_run_waits_for_a_server_that_is_being_started(
    num_refusals: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe_dist.tracking.sender.SEND_INTERVAL_S", 0.01)
    chain = SimpleNamespace(
        directory=tmp_path, parent=None, depth=0, sent=SimpleNamespace(complete=False)
    )
    calls = []

    def sync(journal: object) -> None:
        calls.append(journal)
        if 1 < len(calls) <= 1 + num_refusals:
            raise ConnectionError("refused")

    store = SimpleNamespace(
        sync=sync, shown_uri="http://here", count_pending=lambda _: 1, uploading=""
    )
    sender = Sender(cast("Any", store), cast("Any", chain))
    sender.follow(cast("Any", chain))
    sender.start()
    sender.finish()
    assert len(calls) >= 2 + num_refusals
    assert "still away" not in caplog.text
    assert ("answers again" in caplog.text) == bool(num_refusals)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_server_that_goes_away_loses_and_doubles_nothing(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe_dist.tracking.sender.SEND_INTERVAL_S", 0.2)
    monkeypatch.setattr("moe_dist.tracking.sender.MAX_BACKOFF_S", 0.5)
    monkeypatch.setattr("moe_dist.tracking.sender.CLOSING_TIME_S", 3.0)
    outputs = tmp_path / "outputs"
    stage_dir = outputs / "distill"
    log = MetricLog(stage_dir / "metrics.jsonl")
    caplog.set_level(logging.WARNING, logger="moe_dist.tracking")
    server.start()
    client = mlflow.MlflowClient(tracking_uri=server.uri)
    tracker = build_tracker(server.uri)

    def wait_for(step: int, run_id: str | None) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if run_id and [s for s, _ in points(client, run_id, "loss")] == list(
                range(1, step + 1)
            ):
                return
            time.sleep(0.2)
        pytest.fail(f"step {step} did not arrive: {points(client, run_id or '', 'loss')}")

    with tracker.chain("outage", outputs, params={"a": 1}) as chain:  # noqa: SIM117
        with chain.stage("distill", stage_dir, fingerprint="f") as stage:
            log.append(1, {"loss": 1.0})
            while stage.run_id is None:
                time.sleep(0.1)
            wait_for(1, stage.run_id)
            server.stop()
            for step in (2, 3, 4):
                log.append(step, {"loss": float(step)})
                time.sleep(0.4)
            assert sum("training goes on" in r.message for r in caplog.records) == 1
            server.start()
            wait_for(4, stage.run_id)
            server.stop()
            log.append(5, {"loss": 5.0})
            (stage_dir / "plot.png").write_bytes(b"picture")
            stage.log_artifact(stage_dir / "plot.png")
    assert "still away: 1 points wait" in caplog.records[-1].getMessage()

    server.start()  # the same command runs again; the stage itself is skipped
    with build_tracker(server.uri).chain("outage", outputs, params={"a": 1}) as again:
        pass
    assert again.run_id == chain.run_id
    wait_for(5, stage.run_id)
    assert client.get_run(stage.run_id).info.status == "FINISHED"
    assert [entry.path for entry in client.list_artifacts(stage.run_id)] == ["plot.png"]
