"""An MLflow server that can be stopped and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.hosts.network import Host

START_TIMEOUT_S = 300.0
_ANSWERS = """
import sys, time, urllib.request
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    try:
        urllib.request.urlopen(sys.argv[1] + "/health", timeout=2)
        sys.exit(0)
    except OSError:
        time.sleep(0.3)
sys.exit(1)
"""


class TrackingServer:
    """A server with a store of its own.

    Args:
        directory: for the store, the artifacts and the log.
        host: where it listens; None is this machine's loopback.
        environment: of its process.
    """

    def __init__(
        self,
        directory: Path,
        host: Host | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._host = host
        self._environment = dict(os.environ if environment is None else environment)
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.store = f"sqlite:///{directory}/mlflow.db"

    @property
    def uri(self) -> str:
        """What recipes name."""
        return f"http://{self._host.address if self._host else '127.0.0.1'}:{self._port}"

    def __enter__(self) -> TrackingServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        address = self.uri.removeprefix("http://").partition(":")[0]
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", address, "--port", str(self._port)),
            *("--backend-store-uri", self.store),
            *("--artifacts-destination", str(self._directory / "artifacts")),
        ]
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._on_host(command),
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ask = [sys.executable, "-c", _ANSWERS, self.uri, str(START_TIMEOUT_S)]
        if subprocess.run(self._on_host(ask), check=False).returncode != 0:
            self.stop()
            raise TimeoutError(f"MLflow does not answer; see {self._directory}/server.log")

    def stop(self) -> None:
        """Kill it at once, with its workers."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _on_host(self, command: list[str]) -> list[str]:
        return self._host.command(*command) if self._host else command


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
