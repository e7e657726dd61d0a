"""What runs in each worker process: threads, the watchdog, the job, and a note of why it stopped.

It finds its process group standing and knows nothing of who started it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from moe_dist.timeline import mark
from moe_dist.workers.job_errors import STOPPED_NAME, note_stop, user_error
from moe_dist.workers.records import Records, local_records
from moe_dist.workers.worker_warnings import forwarded_warnings

if TYPE_CHECKING:
    from moe_dist.distributed.stall import Stall

# Everything that sizes a thread pool when a worker's libraries are first imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_worker(config: dict[str, Any]) -> Any:
    """Run a job as one rank of the process group that stands.

    Args:
        config: `work`, a function, and the `job` that it is told; `records`, the place that all
            ranks and the driver share; `num_threads`; `step_timeout_s`.

    Returns:
        What the job returns.

    Raises:
        MoeDistError: the job's own, of which word is left so that it is not tried again.
        Exception: what may be the echo of another rank's death, which is worth another attempt.
    """
    mark("workers, their imports and process group")
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(config["num_threads"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with local_records(config["records"]) as records:
        if (records.directory / STOPPED_NAME).exists():
            # Ray starts the workers again after any error; this one would only come back.
            return None
        return _run(config, records)


def _run(config: dict[str, Any], records: Records) -> Any:
    import torch
    from threadpoolctl import threadpool_limits

    from moe_dist.distributed.device_queue import mark_of_queue
    from moe_dist.distributed.peers import Listener, meet, own_address, own_peer
    from moe_dist.distributed.position import follow_device, follow_phases
    from moe_dist.distributed.watchdog import Watchdog
    from moe_dist.workers.attempts import PhaseNotes, next_attempt, note_attempt, note_fault
    from moe_dist.workers.remote_stage import local_stage

    torch.set_num_threads(config["num_threads"])
    # NumPy's own threads are settled when it is imported, which a forked worker's parent did.
    threadpool_limits(config["num_threads"], user_api="blas")
    listener = Listener(own_address())
    own = own_peer(listener)
    roster = meet(own, attempt=next_attempt(records.directory))
    listener.start(roster.token)
    if own.rank == 0:
        note_attempt(records.directory, roster)
        records.push()

    def note(stall: Stall) -> None:
        # Pushed at once: the watchdog ends the process next.
        note_fault(records.directory, roster.attempt, stall)
        records.push()

    is_first = own.rank == 0
    warnings = forwarded_warnings(records.directory) if is_first else nullcontext()
    watchdog = Watchdog(roster, own.rank, step_timeout_s=config["step_timeout_s"], note=note)
    stage = local_stage(config["job"])
    # Noted inside too, since to upload what a failed job leaves may take long.
    with warnings, _noting_stop(records), stage as job, _noting_stop(records):
        follow_phases(PhaseNotes(records.directory, roster.attempt) if is_first else None)
        follow_device(mark_of_queue())
        with watchdog:
            try:
                return config["work"](job)
            except Exception as fault:
                if user_error(fault) is None:
                    watchdog.explain(fault)
                raise


@contextmanager
def _noting_stop(records: Records) -> Iterator[None]:
    try:
        yield
    except Exception as fault:
        error = user_error(fault)
        if error is None:
            raise
        note_stop(records.directory, error)
        records.push()
        if error is fault:
            raise
        raise error from fault
