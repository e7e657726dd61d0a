"""A connection to Ray: to a cluster, or to a Ray on this machine that is started for it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import moe_dist
from moe_dist.background import in_background
from moe_dist.errors import ClusterError
from moe_dist.workers.forked_workers import ForkedWorkers, forked_workers
from moe_dist.workers.job_errors import first_line

_OBJECT_STORE_BYTES = 256 * 2**20


class RaySession:
    """One connection to Ray for several jobs; a local Ray is started when the first job needs it.

    Joins the cluster that `RAY_ADDRESS` names (as `ray job submit` sets it), or one to which this
    process is connected already; else starts Ray on this machine, and stops it when the `with`
    block ends.

    Args:
        dashboard: start Ray's dashboard too. Training does without and starts faster; nested Ray
            Tune trials need it, or Ray never gives their worker slots back.
        num_cpus: of a Ray that is started here; those that this process may use if None.
        metrics_port: where it shows its metrics; a free one if None.
        preload: modules that are imported once for all workers of a Ray that is started here,
            which are then forked (`moe_dist.workers.fork_server`). A cluster's workers import
            for themselves.
    """

    def __init__(
        self,
        *,
        dashboard: bool = False,
        num_cpus: int | None = None,
        metrics_port: int | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        self._dashboard = dashboard
        self._num_cpus = num_cpus
        self._metrics_port = metrics_port
        self._preload = tuple(preload)
        self._forked: ForkedWorkers | None = None
        self._started = False

    def __enter__(self) -> RaySession:
        """Open the session; nothing is started yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the cluster, or stop it if this session started it."""
        self.close()

    def close(self) -> None:
        """Stop Ray now, if this session started it; the next job starts it again."""
        if self._started:
            import ray

            self._started = False
            ray.shutdown()
        self._stop_forking()

    def _stop_forking(self) -> None:
        if self._forked is not None:
            self._forked.stop()
            self._forked = None

    def connect(self, *, beside: Callable[[], None] | None = None) -> None:
        """Start or join Ray, unless that was done; ClusterError if it does not answer.

        `beside` is done in a thread meanwhile, since Ray mostly waits for its own processes.
        """
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray Train's workers have an environment of their own: those started early stay idle.
        os.environ.setdefault("RAY_enable_worker_prestart", "0")
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        import ray  # Before `beside`: two threads must not import it at once.

        if beside is not None:
            with in_background(lambda _: beside(), "beside-ray"):
                self.connect()
            return
        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        try:
            with _own_termination():
                self._init(address)
        except Exception as fault:  # Ray raises a bare one where its raylet starts too slowly.
            self._stop_forking()
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise ClusterError(
                f"{where} could not be {'reached' if address else 'started'}: {first_line(fault)}",
                remedy=(
                    "See `ray status` there, and set RAY_AUTH_MODE=token with its token if it asks "
                    "for one; unset RAY_ADDRESS to run on this machine."
                    if address
                    else "Free memory and /tmp, stop left-over processes with `ray stop`, or use "
                    "parallel.launcher=local with one worker."
                ),
            ) from fault
        self._started = True

    def _init(self, address: str | None) -> None:
        import ray

        if address:
            ray.init(
                address=address,
                runtime_env=_source_environment(),
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            return
        with _python_path():
            self._forked = forked_workers(self._preload)
            ray.init(
                address="local",
                runtime_env=_forked_environment(self._forked),
                num_cpus=self._num_cpus or available_cpus(),
                include_dashboard=self._dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
                _metrics_export_port=self._metrics_port,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )


def available_cpus() -> int:
    """Count the CPUs that this process may use: its affinity, and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def ray_session(*, dashboard: bool = False, preload: Sequence[str] = ()) -> RaySession:
    """Open one Ray session, in a `with` block, for a chain of jobs, which are handed it."""
    return RaySession(dashboard=dashboard, preload=preload)


def _source_root() -> str:
    return str(Path(moe_dist.__file__).resolve().parent.parent)


def _source_environment() -> dict[str, Any] | None:
    # A submitted job carries its working directory with it, and Ray takes no second environment.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    return {"env_vars": {"PYTHONPATH": _joined_path()}}


def _forked_environment(forked: ForkedWorkers | None) -> dict[str, Any] | None:
    return None if forked is None else {"py_executable": forked.py_executable}


def _joined_path() -> str:
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([_source_root(), *(part for part in known if part)])


@contextmanager
def _python_path() -> Iterator[None]:
    """Let the processes of a local Ray find this source tree, wherever the command was run."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _joined_path()
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _own_termination() -> Iterator[None]:
    """Keep SIGTERM what it was: Ray's native handler would print a trace of addresses first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    yield
    # A program that did not handle it keeps Ray's handler, which takes the workers down.
    handler = before if callable(before) else signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)
