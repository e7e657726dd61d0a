"""What runs in each worker process: threads, the watchdog, the job, and a note of why it stopped.

It finds its process group standing and knows nothing of who started it.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from moe_dist.timeline import mark
from moe_dist.training.job_errors import STOPPED_NAME, note_stop, user_error
from moe_dist.training.relay import forwarded_warnings

# Everything that sizes a thread pool when a worker's libraries are first imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_worker(config: dict[str, Any]) -> Any:
    """Run a job as one rank of the process group that stands.

    Args:
        config: `job` and its `payload`; `records`, the directory that all ranks and the driver
            share; `num_threads`; `step_timeout_s`.

    Returns:
        What the job returns.

    Raises:
        MoeDistError: the job's own, of which word is left so that it is not tried again.
        Exception: what may be the echo of another rank's death, which is worth another attempt.
    """
    records = Path(config["records"])
    if (records / STOPPED_NAME).exists():
        # Ray starts the workers again after any error; this one would only come back.
        return None
    mark("workers, their imports and process group")
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(config["num_threads"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from moe_dist.distributed.peers import Listener, meet, own_address, own_peer
    from moe_dist.distributed.position import follow_phases
    from moe_dist.distributed.watchdog import Watchdog
    from moe_dist.training.attempts import PhaseNotes, next_attempt, note_attempt, note_fault

    torch.set_num_threads(config["num_threads"])
    listener = Listener(own_address())
    own = own_peer(listener)
    follow_phases(None)
    roster = meet(own, attempt=next_attempt(records))
    listener.start(roster.token)
    if own.rank == 0:
        note_attempt(records, roster)
        follow_phases(PhaseNotes(records, roster.attempt))
    note = partial(note_fault, records, roster.attempt)
    relay = forwarded_warnings(records) if own.rank == 0 else nullcontext()
    watchdog = Watchdog(roster, own.rank, step_timeout_s=config["step_timeout_s"], note=note)
    with relay, watchdog:
        try:
            return config["job"](config["payload"])
        except Exception as fault:
            error = user_error(fault)
            if error is None:
                watchdog.explain(fault)
                raise
            note_stop(records, error)
            raise error from fault
