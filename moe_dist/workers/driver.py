"""Runs a job on the workers of a Ray cluster, through Ray Train V2.

The job itself knows nothing of Ray: it is a function of one dictionary that finds its process
group standing. This module places the workers, starts them again when one dies, and brings the
job's own error back.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.background import in_background
from moe_dist.errors import ClusterError, TrainingError
from moe_dist.timeline import mark
from moe_dist.workers.job_errors import explain, first_line, keep_room, read_stop, user_error
from moe_dist.workers.placement import NumWorkers, Placement, plan_placement
from moe_dist.workers.placement_wait import watched_placement
from moe_dist.workers.ray_session import RaySession, ray_session
from moe_dist.workers.records import Records, local_records, open_records
from moe_dist.workers.worker import run_worker
from moe_dist.workers.worker_warnings import WARNINGS_NAME, followed_warnings

if TYPE_CHECKING:
    from ray.train import UserCallback

    from moe_dist.workers.attempts import Restart

POLL_INTERVAL_S = 0.5

logger = logging.getLogger("moe_dist.training")

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class JobResult:
    """What a job gave back.

    Args:
        value: what rank 0 returned.
        num_attempts: how often the workers were started; 1 if none of them died.
        start_up_s: from the call until the job first began on rank 0, in seconds.
        world_sizes: workers of each attempt.
        restarts: why the workers were started again, and what each time took.
    """

    value: Any
    num_attempts: int
    start_up_s: float
    world_sizes: tuple[int, ...]
    restarts: Sequence[Restart] = ()


def run_on_workers(
    work: Work,
    job: Any,
    *,
    num_workers: NumWorkers,
    storage_path: Path | str,
    name: str,
    cpus_per_worker: int = 1,
    use_gpu: bool | None = None,
    max_failures: int = 2,
    wait_s: float = 600.0,
    step_timeout_s: float = 300.0,
    launcher: str = "auto",
    on_poll: Callable[[], None] | None = None,
    session: RaySession | None = None,
) -> JobResult:
    """Run a job on every worker and give back what rank 0 returns.

    A worker that dies (killed, its node lost) or stalls makes all of them start again,
    `max_failures` times at most; the job is expected to continue from its newest checkpoint. An
    error that the job raises for its user is not tried again.

    Args:
        work: a function of the job; on a cluster it must be importable by the workers.
        job: what it is told, a `Job` or anything else that can be sent.
        num_workers: processes; each has its rank and a process group (gloo, or nccl on GPUs).
            A pair is the least and the most of them: the job starts with as many as there are
            worker slots, goes on with fewer when a node is lost, and with more when one comes.
        storage_path: a directory that all nodes share, or a URI as text.
        name: the job's name; its records lie in `storage_path / name`.
        cpus_per_worker: CPUs that each worker reserves, and its number of threads.
        use_gpu: one GPU for each worker; None takes them where Ray has enough of them.
        max_failures: how many deaths of workers are survived.
        wait_s: the longest wait for worker slots that other jobs hold or that are still to come.
        step_timeout_s: how long a training step may stand still before the workers are started
            again, in seconds; see `moe_dist.distributed.watchdog`.
        launcher: `ray`; `local` runs a single worker in this process; `auto` is `ray`, except for
            a single worker where no cluster is given.
        on_poll: called about twice a second while the job runs and once after it, always from one
            thread, which is not the caller's.
        session: the session of the chain; without one, Ray is started for this job alone.

    Returns:
        Rank 0's value, and how often the workers were started.

    Raises:
        ClusterError: if the cluster can never have the CPUs or GPUs asked for, had no free ones
            in time, or cannot be reached.
        TrainingError: if workers died too often, or failed for a reason that is not the user's.
        MoeDistError: whatever error of this kind the job raised.
    """
    from moe_dist.workers.attempts import ATTEMPTS_NAME, FILES, read_restarts

    called = time.time()
    records = open_records(storage_path, name)
    records.clear((*FILES, WARNINGS_NAME))
    keep_room(records.directory)
    config = {
        "work": work,
        "job": job,
        "records": records.location,
        "num_threads": cpus_per_worker,
        "step_timeout_s": step_timeout_s,
    }
    with followed_warnings(records), _polling(on_poll):
        if runs_here(launcher, num_workers):
            value = _run_here(config)
        else:
            with ray_session() if session is None else nullcontext(session) as current:
                current.connect()
                mark("Ray")
                placement = plan_placement(num_workers, cpus_per_worker, use_gpu)
                value = _run_on_ray(config, records, placement, wait_s, max_failures, current)
    records.pull()
    written = (records.directory / ATTEMPTS_NAME).read_text(encoding="utf-8")
    attempts = [json.loads(line) for line in written.splitlines()]
    sizes = tuple(attempt["world_size"] for attempt in attempts)
    restarts = read_restarts(records.directory)
    return JobResult(value, len(attempts), attempts[0]["time"] - called, sizes, restarts)


def runs_here(launcher: str, num_workers: NumWorkers) -> bool:
    """Tell whether a job runs without Ray; `local` with several workers is a ClusterError."""
    if launcher == "local" and num_workers != 1:
        raise ClusterError(
            f"parallel.launcher=local runs one worker, and parallel.num_workers={num_workers}",
            remedy="Set parallel.num_workers=1, or parallel.launcher=ray.",
        )
    alone = num_workers == 1 and not os.environ.get("RAY_ADDRESS")
    return launcher == "local" or (launcher == "auto" and alone)


def _run_here(config: dict[str, Any]) -> Any:
    import torch

    from moe_dist.distributed.peers import Roster, own_peer
    from moe_dist.workers.attempts import note_attempt
    from moe_dist.workers.remote_stage import local_stage

    threads_before = torch.get_num_threads()
    torch.set_num_threads(config["num_threads"])
    try:
        with local_records(config["records"]) as records:
            note_attempt(records.directory, Roster(1, "", (own_peer(),)))
            with local_stage(config["job"]) as job:
                return config["work"](job)
    except Exception as fault:
        error = user_error(fault)
        if error is None or error is fault:
            raise
        raise error from fault
    finally:
        torch.set_num_threads(threads_before)


def _run_on_ray(
    config: dict[str, Any],
    records: Records,
    placement: Placement,
    wait_s: float,
    max_failures: int,
    session: RaySession,
) -> Any:
    # A stage lasts seconds on a small model: Ray's two seconds between looks are too many.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # How long Ray Train asks for one set of worker slots before it looks how many there are; until
    # then it neither notices a lost node nor takes an order to stop.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    if not os.environ.get("RAY_ADDRESS"):
        # Nobody reclaims one's own machine; its watcher is one process more at every start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # A stopped process answers nobody: where no other rank's watchdog ends it, Ray does. It waits
    # longer, since a watchdog says where the others waited.
    step_timeout_s = config["step_timeout_s"]
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(2 * step_timeout_s + 15)
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from moe_dist.distributed.watchdog import group_timeout_s
    from moe_dist.workers.attempts import read_restarts
    from moe_dist.workers.lean_trainer import LeanTorchTrainer
    from moe_dist.workers.process_group import NodeTorchConfig

    scaling = placement.scaling()
    trainer = LeanTorchTrainer(
        run_worker,
        train_loop_config=config,
        scaling_config=scaling,
        torch_config=NodeTorchConfig(
            backend="nccl" if scaling.use_gpu else "gloo",
            timeout_s=math.ceil(group_timeout_s(step_timeout_s)),
        ),
        run_config=RunConfig(
            **records.ray_storage,
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[_death_notes(records.location)],
        ),
    )
    fault: TrainingFailedError | None = None
    value: Any = None
    try:
        with watched_placement(placement, records.directory, wait_s), _own_interrupt():
            value = trainer.fit().return_value
    except TrainingFailedError as failed:
        fault = failed
        # Without the dashboard Ray 2.60 keeps a failed job's worker slots, and the next job waits
        # for them for ever.
        session.close()
    except RayActorError as failed:
        # The controller died, by our own hand if the wait for worker slots was too long.
        session.close()
        records.pull()
        if read_stop(records.directory) is None:
            raise TrainingError(
                f"the process that governs the workers died: {first_line(failed)}",
                remedy="The same command continues from the newest checkpoint. It runs beside this "
                "one and may have been killed for want of memory.",
            ) from failed
    records.pull()
    stopped = read_stop(records.directory)
    if stopped is not None:
        raise stopped
    if fault is not None:
        reasons = [restart.reason for restart in read_restarts(records.directory) if restart.reason]
        raise explain(fault, max_failures, reasons) from None
    return value


def _death_notes(location: str) -> UserCallback:
    """Return what Ray's controller calls when a worker failed, before it ends the others."""
    from ray.train import UserCallback

    class DeathNotes(UserCallback):
        def after_exception(
            self, run_context: object, worker_exceptions: dict[int, Exception]
        ) -> None:
            from moe_dist.workers.attempts import note_deaths

            with local_records(location) as records:
                note_deaths(records.directory, worker_exceptions)

    return DeathNotes()


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
def _polling(on_poll: Callable[[], None] | None) -> Iterator[None]:
    if on_poll is None:
        yield
        return

    def poll(over: threading.Event) -> None:
        try:
            while not over.wait(POLL_INTERVAL_S):
                on_poll()
            on_poll()
        except Exception:  # A fault of the display is no reason to stop training.
            logger.exception("the progress display failed; the job goes on without it")

    with in_background(poll, "job-progress"):
        yield
