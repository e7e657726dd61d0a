"""Where chaos runs run: on this machine, or over two hosts."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from tests.chaos.tracking_server import TrackingServer
from tests.hosts.network import TwoHosts
from tests.hosts.ray_cluster import ROOT, RayCluster

SMALL_DISK_MIB = 512
LOOK_EVERY_S = 2.0
# Agents of a node whose raylet was killed look for the head for a minute before they give up.
CLEAN_TIMEOUT_S = 120.0
MARKER = "MDT_CHAOS_TESTBED"
_GROUPS = """
import json, ray
ray.init(logging_level="ERROR", log_to_driver=False)
groups = ray.util.placement_group_table().values()
print(json.dumps([g["placement_group_id"] for g in groups if g["state"] != "REMOVED"]))
"""
_CLUSTER_PROGRAMS = (
    "gcs_server",
    "raylet",
    "monitor.py",
    "log_monitor.py",
    "dashboard.py",
    "ray.util.client.server",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "ray::IDLE",
    # Ray's own, one for each cluster, and detached from every job.
    "ray::_AutoscalingCoordinatorActor",
    "default_worker.py",
    "mlflow",
    "multiprocessing",
    "uvicorn",
)


class Testbed:
    """This machine: every driver starts and ends its own Ray.

    Args:
        with_server: whether runs are tracked by an MLflow server, else in a sqlite store.
    """

    name = "local"
    directory: Path

    def __init__(self, *, with_server: bool = True) -> None:
        self._with_server = with_server
        self._stack = ExitStack()
        self._id = secrets.token_hex(4)
        self.server: TrackingServer | None = None

    def __enter__(self) -> Testbed:
        with ExitStack() as stack:
            # Short, since Ray's sockets lie in it.
            self.directory = Path(tempfile.mkdtemp(prefix="mdc-", dir="/tmp"))
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self._end_all)
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def tracking_uri(self) -> str:
        """Where the runs are recorded, as recipes say it."""
        return self.server.uri if self.server else self.store

    @property
    def store(self) -> str:
        """The store behind it, which can be read without the server."""
        return self.server.store if self.server else f"sqlite:///{self.directory}/mlflow.db"

    def environment(self) -> dict[str, str]:
        """Return the environment of a driver."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.directory),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            MARKER: self._id,
        }

    def command(self, *arguments: str) -> list[str]:
        """Return a driver's command line."""
        return [sys.executable, *arguments]

    def tend(self) -> None:
        """Do what an operator or a supervisor of nodes does, now and then."""

    def left_over(self) -> list[str]:
        """Name what a finished run left behind: processes, and with them their ports."""
        return [_title(pid) for pid in _pids_with(f"{MARKER}={self._id}")]

    def _end_all(self) -> None:
        """Kill what a lost run left, and drivers that still run."""
        for pid in _pids_with(f"{MARKER}={self._id}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _open(self, stack: ExitStack) -> None:
        if self._with_server:
            # Not marked: it outlives the runs.
            unmarked = {k: v for k, v in self.environment().items() if k != MARKER}
            server = TrackingServer(self.directory / "mlflow", environment=unmarked)
            self.server = stack.enter_context(server)


class HostsTestbed(Testbed):
    """Two hosts with one Ray cluster over them, which outlives the runs; MLflow on the switch."""

    name = "hosts"
    hosts: TwoHosts
    cluster: RayCluster
    _is_tended = True
    _next_look = 0.0

    def environment(self) -> dict[str, str]:
        return super().environment() | self.cluster.environment()

    def command(self, *arguments: str) -> list[str]:
        return self.hosts.a.command(*super().command(*arguments))

    def tend(self) -> None:
        """Start the worker node again where it has gone, as a supervisor does."""
        if not self._is_tended or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_EVERY_S
        if not self.cluster.raylets(self.hosts.b):
            self.hosts.b.end_all()
            self.cluster.start_node()

    def lose_head(self) -> None:
        """Kill all of Ray on the head; drivers there are spared."""
        self._is_tended = False
        self.cluster.kill_node(self.hosts.a)

    def restore_cluster(self) -> None:
        """Start head and node anew."""
        for host in (self.hosts.a, self.hosts.b):
            host.end_all()
        self.cluster.start_head()
        self.cluster.start_node()
        self.cluster.wait_for_nodes(2)
        self._is_tended = True

    def left_over(self) -> list[str]:
        """Name processes that are not the cluster's own, and placement groups."""
        found = [
            f"{host.namespace}: {title}"
            for host in (self.hosts.a, self.hosts.b)
            for title in map(_title, host.pids())
            if title and not any(program in title for program in _CLUSTER_PROGRAMS)
        ]
        return found or self._placement_groups()

    def _placement_groups(self) -> list[str]:
        done = subprocess.run(
            self.command("-c", _GROUPS),
            env=self.environment() | {"RAY_ADDRESS": self.cluster.address},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode != 0:
            return [f"the cluster does not answer: {done.stderr[-300:]}"]
        groups = done.stdout.strip().splitlines()[-1]
        return [] if groups == "[]" else [f"placement groups {groups}"]

    def _open(self, stack: ExitStack) -> None:

        self.hosts = stack.enter_context(TwoHosts())
        self.cluster = stack.enter_context(RayCluster(self.hosts))
        self.server = stack.enter_context(
            TrackingServer(self.directory / "mlflow", self.hosts.switch, super().environment())
        )


class SmallDisk:
    """A file system in memory that a test can fill without harm to the machine.

    Args:
        directory: where it is mounted; made and removed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> SmallDisk:
        self.directory.mkdir(parents=True)
        options = ["-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m", "tmpfs", str(self.directory)]
        subprocess.run(["mount", *options], check=True, capture_output=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        subprocess.run(["umount", "--lazy", str(self.directory)], check=False)


def wait_until_clean(testbed: Testbed, timeout_s: float = CLEAN_TIMEOUT_S) -> list[str]:
    """Wait until a run has left nothing behind.

    Args:
        testbed: where it ran.
        timeout_s: how long its processes may take to end.

    Returns:
        What is left after that time; empty if nothing is.
    """
    until = time.monotonic() + timeout_s
    while (left := testbed.left_over()) and time.monotonic() < until:
        time.sleep(0.5)
    return left


def _pids_with(variable: str) -> list[int]:
    found = []
    wanted = variable.encode()
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            with suppress(OSError):
                if wanted in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def _title(pid: int) -> str:
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        return f"{line.decode(errors='replace').strip()[:120]}"
    return ""
