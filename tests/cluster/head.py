"""Servers of a small cluster on this machine: a Ray head with tokens, and MLflow; loopback only."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
START_TIME_S = 180.0
PLANTED = {
    "HF_TOKEN": "hf_plantedplantedplanted",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret0123456789",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
    "MY_SERVICE_API_KEY": "planted-service-key",
}
"""Secrets of a node's environment, which must come out nowhere."""


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str
    token: str
    environment: dict[str, str]
    temp_dir: Path
    process: psutil.Process


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def running_head(num_cpus: int = 2) -> Iterator[Head]:
    """Start a head node as a person would, with a token of its own; end all that it started."""
    gcs, dashboard, client, agent, agent_grpc, metrics, *_ = free_ports(6)
    # Sockets lie in it, and their paths are limited to 107 characters.
    temp_dir = Path(tempfile.mkdtemp(prefix="mdh-", dir="/tmp"))
    token = uuid.uuid4().hex
    token_path = temp_dir / "token"
    token_path.write_text(token)
    environment = _clean_environment() | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        **PLANTED,
    }
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={num_cpus}"),
        *("--node-ip-address=127.0.0.1", f"--temp-dir={temp_dir}/ray", f"--port={gcs}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={256 << 20}"),
    ]
    address = f"http://127.0.0.1:{dashboard}"
    try:
        with _running(command, environment, temp_dir / "head.log") as process:
            _wait_for(f"{address}/api/version", token, process, temp_dir / "head.log")
            yield Head(address, token, environment, temp_dir, process)
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


@contextmanager
def running_mlflow(directory: Path) -> Iterator[str]:
    """Start a tracking server with a database of its own, and give its address."""
    (port,) = free_ports(1)
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{directory}/store.db"),
        *("--artifacts-destination", str(directory / "artifacts")),
    ]
    log = directory / "mlflow.log"
    # Its jobs score traces, for which it starts more processes, each with all of MLflow.
    environment = _clean_environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with _running(command, environment, log) as process:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/health", "", process, log)
        yield address


def _clean_environment() -> dict[str, str]:
    ours = ("RAY_", "MLFLOW_", "PYTHONPATH", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


@contextmanager
def _running(
    command: list[str], environment: dict[str, str], log: Path
) -> Iterator[psutil.Process]:
    with log.open("wb") as stream:
        started = psutil.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        _end(started)


def _end(process: psutil.Process) -> None:
    """End a process and everything below it, whatever group its children chose."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=20)


def _wait_for(url: str, token: str, process: psutil.Process, log: Path) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    deadline_s = time.monotonic() + START_TIME_S
    while time.monotonic() < deadline_s:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            break
        request = urllib.request.Request(url, headers=headers)
        with suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.3)
    raise RuntimeError(f"{url} did not come up:\n{log.read_text(errors='replace')[-3000:]}")
