"""HAProxy with Serve's configuration, as it is started here: where it listens, and when it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from moe_dist.serving.haproxy import (
    UnusableError,
    environment_of,
    haproxy_binary,
    haproxy_variables,
    is_declined,
)
from moe_dist.serving.haproxy_start import own_configuration

ERRORS = "/folder/no_answer.http"


def serve_configuration(folder: Path, port: int, *replicas: int) -> Path:
    """What Serve writes, with replicas at ports."""
    haproxy = pytest.importorskip("ray.serve._private.haproxy")
    from ray.serve.config import HTTPOptions

    servers = [haproxy.ServerConfig(f"r{port}", "127.0.0.1", port) for port in replicas]
    backends = {"http-a": haproxy.BackendConfig("http-a", path_prefix="/", servers=servers)}
    api = haproxy.HAProxyApi(
        haproxy.HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=port),
            socket_path=str(folder / "sock"),
            metrics_socket_path=str(folder / "log"),
            server_state_base=str(folder),
            server_state_file=str(folder / "state"),
            is_head=True,
        ),
        backends if replicas else {},
        str(folder / "cfg"),
    )
    api._generate_config_file_internal()
    return folder / "cfg"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as own:
        return int(own.getsockname()[1])


@pytest.mark.parametrize("replicas", [(), (30000, 30001)])
def test_of_serves_ports_only_that_of_requests_is_left(
    tmp_path: Path, replicas: tuple[int, ...]
) -> None:
    config = serve_configuration(tmp_path, 8000, *replicas).read_text()
    assert len(re.findall(r"^\s*bind ", config, re.MULTILINE)) == 3  # What this is for.
    found = own_configuration(config, "0.0.0.0:9000", ERRORS)
    assert re.findall(r"^\s*bind (.*)$", found, re.MULTILINE) == ["0.0.0.0:9000"]
    assert "127.0.0.1:514" in config and "127.0.0.1:514" not in found
    assert re.findall(r"errorfile (\d+ .*)", found) == [f"{s} {ERRORS}" for s in (502, 503, 504)]
    assert "status 404" in config and "status 404" not in found
    assert all(f"server r{port} 127.0.0.1:{port} check" in found for port in replicas)
    assert found.count("timeout http-request 30s") == 1
    # Each reload brings it again.
    assert own_configuration(found, "0.0.0.0:9000", ERRORS) == found


def test_a_configuration_that_listens_elsewhere_too_is_refused(tmp_path: Path) -> None:
    config = serve_configuration(tmp_path, 8000).read_text()
    with pytest.raises(ValueError, match=r"at 127\.0\.0\.1:8000 alone, and not with .*9999"):
        own_configuration(f"{config}frontend more\n    bind *:9999\n", "127.0.0.1:8000", ERRORS)
    with pytest.raises(ValueError, match=r"not with \[\]"):
        own_configuration("global\n", "127.0.0.1:8000", ERRORS)


def test_all_that_haproxy_writes_lies_in_a_folder_of_the_session() -> None:
    with (
        haproxy_variables("/bin/true", "::1", 8000) as some,
        haproxy_variables("/bin/true", "::1", 8000) as others,
    ):
        start = Path(some["RAY_SERVE_HAPROXY_BINARY_PATH"])
        assert stat.S_IMODE(start.parent.stat().st_mode) == 0o700
        assert "'[::1]:8000'" in start.read_text()
        paths = [name for name in some if name.endswith(("_LOC", "_PATH", "_BASE", "_FILE"))]
        assert len(paths) == 6
        for name in paths:
            assert some[name] != others[name]
            assert Path(some[name]).is_relative_to(start.parent)
            # A node's folder and HAProxy's own suffix are added, and a socket's path is short.
            assert len(some[name]) - len(os.fspath(start.parent)) < 10
        from ray.serve._private import constants

        fixed = {
            name for name in dir(constants) if "/haproxy-serve" in str(getattr(constants, name))
        }
        assert fixed <= set(some) and fixed
    assert not start.parent.exists()


@pytest.mark.parametrize("binary", ["/bin/false", "/there/is/none"])
def test_a_haproxy_that_does_not_run_here_is_not_taken(binary: str) -> None:
    with pytest.raises(UnusableError), haproxy_variables(binary, "127.0.0.1", 8000):
        pass


def test_haproxys_own_reason_is_given(binary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_MAXCONN", "no number")
    with (
        pytest.raises(UnusableError, match=r"\[ALERT\].*maxconn"),
        haproxy_variables(binary, "127.0.0.1", 8000),
    ):
        pass


def test_a_long_folder_for_temporary_files_does_not_matter(
    binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("a" * 80)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with haproxy_variables(binary, "127.0.0.1", 8000) as variables:
        assert Path(variables["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent.parent == Path("/tmp")


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "3")
    with haproxy_variables("/bin/true", "127.0.0.1", 8000) as variables:
        assert variables["RAY_SERVE_HAPROXY_NBTHREAD"] == "3"


def test_the_environment_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DIST_A", "before")
    with environment_of({"MOE_DIST_A": "1", "MOE_DIST_B": "2"}):
        assert (os.environ["MOE_DIST_A"], os.environ["MOE_DIST_B"]) == ("1", "2")
    assert os.environ["MOE_DIST_A"] == "before" and "MOE_DIST_B" not in os.environ
    assert is_declined({"RAY_SERVE_ENABLE_HA_PROXY": "0"}) and not is_declined({})


@pytest.fixture
def binary() -> str:
    found = haproxy_binary()
    if found is None:
        pytest.skip("HAProxy is not on this machine")
    return found


def ask(port: int) -> tuple[int, Any, Any]:
    """Status, Retry-After and what it says."""
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", b"{}", timeout=60)
        except urllib.error.HTTPError as fault:
            return fault.code, fault.headers["Retry-After"], json.loads(fault.read())
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


def haproxys_group(parent: int) -> int:
    own = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return os.getpgid(int(own[0]))


def test_haproxy_takes_it_and_ends_with_the_process_that_started_it(binary: str) -> None:
    """Also says, in JSON, that there is no model, and that no replica gave an answer."""
    for replicas, said in (((), "no model is served"), ((free_port(),), "no replica gave")):
        port = free_port()
        with haproxy_variables(binary, "127.0.0.1", port) as variables:
            start = variables["RAY_SERVE_HAPROXY_BINARY_PATH"]
            config = serve_configuration(Path(start).parent, 1, *replicas)
            starts = f"import subprocess, sys; subprocess.run({[start, '-db', '-f', str(config)]})"
            parent = subprocess.Popen([sys.executable, "-c", starts])
            try:
                status, retry_after, found = ask(port)
                assert (status, retry_after, list(found)) == (503, "1", ["error"])
                assert said in found["error"]
                # What a terminal sends to the group of the command does not reach it.
                assert haproxys_group(parent.pid) != os.getpgid(parent.pid)
            finally:
                parent.send_signal(signal.SIGKILL)
                parent.wait()
            end = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                except OSError:
                    break
                assert time.monotonic() < end, "HAProxy is left behind"
                time.sleep(0.05)
