"""MLflow's servers for tests that need them: one for tracking, one for a model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """An MLflow server on the loopback interface that can be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port"]
        command += [str(self.port), "--workers", "1", "--backend-store-uri"]
        command += [f"sqlite:///{self._directory}/server.db", "--serve-artifacts"]
        command += ["--artifacts-destination", str(self._directory / "artifacts")]
        with (self._directory / "server.log").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                cwd=self._directory,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        pytest.fail((self._directory / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


def ask_served_model(store: str, model_uri: str, question: Any, directory: Path) -> Any:
    """Serve a model with `mlflow models serve`, ask it once, and end it."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", model_uri, "--port", str(port), "--workers", "1"]
    # MLflow starts uvicorn by its name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"MLFLOW_TRACKING_URI": store, "PYTHONPATH": os.getcwd(), "PATH": path}
    with (directory / "serve.log").open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **own},
            start_new_session=True,
        )
    try:
        return _ask(f"http://127.0.0.1:{port}", question, process)
    except OSError:
        pytest.fail((directory / "serve.log").read_text()[-3000:])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ask(url: str, question: Any, process: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + 400
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=5):
                break
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
            time.sleep(0.5)
    request = urllib.request.Request(
        f"{url}/invocations",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def points(client: Any, run_id: str | None, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
