"""A Ray cluster over two hosts: a head on `a`, a worker node on `b`; token authentication is on."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.hosts.network import Host, TwoHosts

ROOT = Path(__file__).resolve().parent.parent.parent
PORT = 6379
START_TIMEOUT_S = 300.0
OBJECT_STORE_BYTES = 100 * 2**20
_NODE_PROGRAMS = ("gcs_server", "raylet")


class RayCluster:
    """A cluster that can be hurt: either node can be ended and started again.

    Args:
        hosts: where it runs; they must stand.
        num_cpus: what each host offers.
    """

    def __init__(self, hosts: TwoHosts, *, num_cpus: int = 1) -> None:
        self.hosts = hosts
        self.num_cpus = num_cpus
        # Unix sockets have 107 characters for their whole path.
        self.directory = Path(tempfile.mkdtemp(prefix="mdt-", dir="/tmp"))
        self._token = self.directory / "token"
        self._token.write_text(secrets.token_hex(32))
        self._token.chmod(0o600)
        self._num_starts = 0

    @property
    def address(self) -> str:
        """Where drivers on `a` reach the cluster."""
        return f"{self.hosts.a.address}:{PORT}"

    def environment(self) -> dict[str, str]:
        """Return the environment of drivers and nodes."""
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.directory),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def __enter__(self) -> RayCluster:
        try:
            self.start_head()
            self.start_node()
            self.wait_for_nodes(2)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End both nodes and remove their files."""
        for host in (self.hosts.a, self.hosts.b):
            host.end_all()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start_head(self) -> None:
        """Start the head on `a`."""
        self._start(self.hosts.a, "--head", f"--port={PORT}", "--include-dashboard=false")

    def start_node(self) -> None:
        """Start the worker node on `b`."""
        self._start(self.hosts.b, f"--address={self.address}")

    def wait_for_nodes(self, count: int) -> None:
        """Wait until so many nodes are alive.

        Raises:
            TimeoutError: if they do not come up.
        """
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            if self.num_alive() == count:
                return
            time.sleep(0.5)
        raise TimeoutError(f"the cluster does not have {count} nodes; see {self.directory}")

    def num_alive(self) -> int:
        """Count the nodes that the head believes alive; 0 if it does not answer."""
        code = (
            "import sys; from ray._raylet import GcsClient; "
            "nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5); "
            "print(sum(node.state == 0 for node in nodes.values()))"
        )
        done = subprocess.run(
            self.hosts.a.command(sys.executable, "-c", code, self.address),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return int(done.stdout) if done.returncode == 0 else 0

    def raylets(self, host: Host) -> list[int]:
        """Return the process ids of a host's raylet: one, or none where it is down."""
        return [pid for pid in host.pids() if _program(pid) == "raylet"]

    def kill_raylet(self, host: Host) -> None:
        """Kill a host's raylet; its workers die with it."""
        for pid in self.raylets(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_node(self, host: Host) -> None:
        """Kill all of Ray on a host; drivers there are spared, its workers die with the raylet."""
        for pid in host.pids():
            if _program(pid) in _NODE_PROGRAMS:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _start(self, host: Host, *options: str) -> None:
        self._num_starts += 1
        temporary = self.directory / f"{host.namespace[-1]}{self._num_starts}"
        log = (self.directory / f"{temporary.name}.log").open("wb")
        subprocess.run(
            host.command(
                str(Path(sys.executable).parent / "ray"),
                "start",
                *options,
                f"--node-ip-address={host.address}",
                f"--temp-dir={temporary}",
                f"--num-cpus={self.num_cpus}",
                f"--object-store-memory={OBJECT_STORE_BYTES}",
                "--disable-usage-stats",
            ),
            env=self.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=START_TIMEOUT_S,
            check=True,
        )
        log.close()


def _program(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
