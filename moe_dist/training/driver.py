"""Runs a job on the workers of a Ray cluster, through Ray Train V2.

The job itself knows nothing of Ray: it is a function of one dictionary that finds its process
group standing. This module starts or joins the cluster, places the workers, starts them again
when one dies, and brings the job's own error back.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import moe_dist
from moe_dist.errors import ClusterError
from moe_dist.training.job_errors import (
    STOPPED_NAME,
    explain,
    first_line,
    note_stop,
    read_stop,
    user_error,
)

if TYPE_CHECKING:
    from ray.train import ScalingConfig

POLL_INTERVAL_S = 0.5
ATTEMPTS_NAME = "attempts.jsonl"
_OBJECT_STORE_BYTES = 256 * 2**20
# Everything that sizes a thread pool when a worker's libraries are first imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

logger = logging.getLogger("moe_dist.training")

Job = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class JobResult:
    """What a job gave back.

    Args:
        value: what rank 0 returned.
        num_attempts: how often the workers were started; 1 if none of them died.
        start_up_s: from the call until the job first began on rank 0, in seconds.
    """

    value: Any
    num_attempts: int
    start_up_s: float


class RaySession:
    """One connection to Ray for several jobs; a local Ray is started when the first job needs it.

    Joins the cluster that `RAY_ADDRESS` names (as `ray job submit` sets it), or one to which this
    process is connected already; else starts Ray on this machine, and stops it when the `with`
    block ends.

    Args:
        dashboard: start Ray's dashboard too. Training does without and starts faster; nested Ray
            Tune trials need it, or Ray never gives their places back.
    """

    def __init__(self, *, dashboard: bool = False) -> None:
        self._dashboard = dashboard
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

    def connect(self) -> None:
        """Start or join Ray; does nothing if that was done.

        Raises:
            ClusterError: if the cluster cannot be reached, or a local Ray does not start.
        """
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        try:
            with _own_termination():
                self._init(address)
        except (ConnectionError, RuntimeError, OSError, ValueError, TimeoutError) as fault:
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
            ray.init(
                address="local",
                num_cpus=available_cpus(),
                include_dashboard=self._dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
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


def ray_session(*, dashboard: bool = False) -> RaySession:
    """Open one Ray session for a chain of jobs, each of which is handed it.

    Args:
        dashboard: see `RaySession`.

    Returns:
        The session, for a `with` statement.
    """
    return RaySession(dashboard=dashboard)


def run_on_workers(
    job: Job,
    payload: Mapping[str, Any],
    *,
    num_workers: int,
    storage_path: Path,
    name: str,
    cpus_per_worker: int = 1,
    use_gpu: bool | None = None,
    max_failures: int = 2,
    launcher: str = "auto",
    on_poll: Callable[[], None] | None = None,
    session: RaySession | None = None,
) -> JobResult:
    """Run a job on every worker and give back what rank 0 returns.

    A worker that dies (killed, its node lost) makes all of them start again, `max_failures` times
    at most; the job is expected to continue from its newest checkpoint. An error that the job
    raises for its user is not tried again.

    Args:
        job: a function of one dictionary; on a cluster it must be importable by the workers.
        payload: the dictionary, of plain values and paths.
        num_workers: processes; each has its rank and a process group (gloo, or nccl on GPUs).
        storage_path: a directory that all nodes share.
        name: the job's name; its records lie in `storage_path / name`.
        cpus_per_worker: CPUs that each worker reserves, and its number of threads.
        use_gpu: one GPU for each worker; None takes them where Ray has enough of them.
        max_failures: how many deaths of workers are survived.
        launcher: `ray`; `local` runs a single worker in this process; `auto` is `ray`, except for
            a single worker where no cluster is given.
        on_poll: called about twice a second while the job runs and once after it, always from one
            thread, which is not the caller's.
        session: the session of the chain; without one, Ray is started for this job alone.

    Returns:
        Rank 0's value, and how often the workers were started.

    Raises:
        ClusterError: if the cluster has fewer CPUs or GPUs than asked for, or cannot be reached.
        TrainingError: if workers died too often, or failed for a reason that is not the user's.
        MoeDistError: whatever error of this kind the job raised.
    """
    called = time.time()
    records = Path(storage_path).absolute() / name
    records.mkdir(parents=True, exist_ok=True)
    for stale in (STOPPED_NAME, ATTEMPTS_NAME):
        (records / stale).unlink(missing_ok=True)
    config = {
        "job": job,
        "payload": dict(payload),
        "records": str(records),
        "num_threads": cpus_per_worker,
    }
    with _polling(on_poll):
        if _runs_here(launcher, num_workers):
            value = _run_here(config)
        else:
            with ray_session() if session is None else nullcontext(session) as current:
                current.connect()
                value = _run_on_ray(
                    config, num_workers, cpus_per_worker, use_gpu, max_failures, current
                )
    attempts = [json.loads(line) for line in (records / ATTEMPTS_NAME).read_text().splitlines()]
    return JobResult(value, len(attempts), attempts[0]["time"] - called)


def _runs_here(launcher: str, num_workers: int) -> bool:
    if launcher == "local" and num_workers != 1:
        raise ClusterError(
            f"parallel.launcher=local runs one worker, and parallel.num_workers={num_workers}",
            remedy="Set parallel.num_workers=1, or parallel.launcher=ray.",
        )
    alone = num_workers == 1 and not os.environ.get("RAY_ADDRESS")
    return launcher == "local" or (launcher == "auto" and alone)


def _run_here(config: dict[str, Any]) -> Any:
    import torch

    threads_before = torch.get_num_threads()
    torch.set_num_threads(config["num_threads"])
    try:
        _note_attempt(Path(config["records"]))
        return config["job"](config["payload"])
    except Exception as fault:
        error = user_error(fault)
        if error is None or error is fault:
            raise
        raise error from fault
    finally:
        torch.set_num_threads(threads_before)


def _run_on_ray(
    config: dict[str, Any],
    num_workers: int,
    cpus_per_worker: int,
    use_gpu: bool | None,
    max_failures: int,
    session: RaySession,
) -> Any:
    # A stage lasts seconds on a small model: Ray's two seconds between looks are too many.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # On a busy machine the workers' imports alone outlast Ray's minute, and it would begin again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    records = Path(config["records"])
    scaling = _plan_workers(num_workers, cpus_per_worker, use_gpu)
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config=config,
        scaling_config=scaling,
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=RunConfig(
            name=records.name,
            storage_path=str(records.parent),
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    fault: TrainingFailedError | None = None
    value: Any = None
    with _own_interrupt():
        try:
            value = trainer.fit().return_value
        except TrainingFailedError as failed:
            fault = failed
            # Without the dashboard Ray 2.60 keeps a failed job's places, and the next job waits
            # for them for ever.
            session.close()
    stopped = read_stop(records)
    if stopped is not None:
        raise stopped
    if fault is not None:
        raise explain(fault, max_failures) from None
    return value


def _plan_workers(num_workers: int, cpus_per_worker: int, use_gpu: bool | None) -> ScalingConfig:
    """Check the wish against the cluster, since Ray would wait for ever."""
    import ray
    from ray.train import ScalingConfig

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    wanted_cpus = num_workers * cpus_per_worker
    if wanted_cpus > cpus:
        fitting = max(1, cpus // cpus_per_worker)
        raise ClusterError(
            f"parallel.num_workers={num_workers} x parallel.cpus_per_worker={cpus_per_worker} "
            f"= {wanted_cpus} CPUs, and the Ray cluster has {cpus}",
            remedy=f"Set parallel.num_workers to {fitting} or less, reserve fewer CPUs for each "
            "worker, or add nodes.",
        )
    if use_gpu is True and num_workers > gpus:
        raise ClusterError(
            f"parallel.num_workers={num_workers} on GPUs needs {num_workers} GPUs, and the Ray "
            f"cluster has {gpus}",
            remedy="Set parallel.use_gpu=false, lower parallel.num_workers, or add GPU nodes.",
        )
    on_gpu = gpus >= num_workers if use_gpu is None else use_gpu
    per_worker = {"CPU": float(cpus_per_worker)} | ({"GPU": 1.0} if on_gpu else {})
    return ScalingConfig(num_workers=num_workers, use_gpu=on_gpu, resources_per_worker=per_worker)


def _worker_main(config: dict[str, Any]) -> Any:
    """What runs on each worker: threads, then the job, then a note of why it stopped."""
    records = Path(config["records"])
    if (records / STOPPED_NAME).exists():
        # Ray starts the workers again after any error; this one would only come back.
        return None
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(config["num_threads"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(config["num_threads"])
    if int(os.environ.get("RANK", "0")) == 0:
        _note_attempt(records)
    try:
        return config["job"](config["payload"])
    except Exception as fault:
        error = user_error(fault)
        if error is not None:
            note_stop(records, error)
            raise error from fault
        raise


def _note_attempt(records: Path) -> None:
    with (records / ATTEMPTS_NAME).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), "pid": os.getpid()}) + "\n")


def _source_root() -> str:
    return str(Path(moe_dist.__file__).resolve().parent.parent)


def _source_environment() -> dict[str, Any] | None:
    # A submitted job carries its working directory with it, and Ray takes no second environment.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    return {"env_vars": {"PYTHONPATH": _joined_path()}}


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
def _own_interrupt() -> Iterator[None]:
    """Keep Ctrl-C an interrupt: Ray's own handler would end the program with status 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, before)


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


@contextmanager
def _polling(on_poll: Callable[[], None] | None) -> Iterator[None]:
    if on_poll is None:
        yield
        return
    done = threading.Event()

    def poll() -> None:
        try:
            while not done.wait(POLL_INTERVAL_S):
                on_poll()
            on_poll()
        except Exception:  # A fault of the display is no reason to stop training.
            logger.exception("the progress display failed; the job goes on without it")

    thread = threading.Thread(target=poll, name="job-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
