"""A job whose stage lies at a URI: it works in scratch space, and what must last is uploaded.

The job itself sees local directories only. Each node downloads the models that the job reads and
the newest good checkpoint; rank 0's metric log and checkpoints go up while it trains, and its
results when it has finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_dist.distributed.checkpoint import verify_checkpoint
from moe_dist.errors import CheckpointError
from moe_dist.jobs.job import Job
from moe_dist.jobs.results import CHECKPOINT_DIR
from moe_dist.metric_log import METRIC_LOG
from moe_dist.storage import MANIFEST, Store, download_tree
from moe_dist.storage.scratch import scratch_root
from moe_dist.training.collectives import gather_values, own_rank, wait_for_ranks
from moe_dist.uris import is_uri
from moe_dist.workers.stage_upload import uploaded_stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """What all ranks of one attempt agree on: the scratch directory's name, the checkpoints."""

    token: str
    checkpoints: tuple[str, ...]


@contextmanager
def local_stage(job: Any) -> Iterator[Any]:
    """Let a job work on local directories, whatever it names; collective.

    The downloads are over, on every rank, when the block begins; the results are uploaded when it
    ends well. So neither counts as time in which the job stands still.

    Args:
        job: where its stage lies at a URI, it works in scratch space. What is no `Job` is given
            back as it is.

    Yields:
        The job with paths in place of URIs.

    Raises:
        StorageError: if the store cannot be read, or does not take the results.
        CheckpointError: if there are checkpoints and none of them is good.
    """
    if not isinstance(job, Job) or not is_uri(job.stage_dir):
        yield job
        return
    store = Store(job.stage_dir)
    plan = gather_values(_plan(store) if own_rank() == 0 else None)[0]
    inputs = {name: uri for name in job.INPUTS if is_uri(uri := getattr(job, name))}
    home = _prepare(store, plan, inputs)
    wait_for_ranks()
    stage = home / "stage"
    with uploaded_stage(store, stage) if own_rank() == 0 else nullcontext():
        local: dict[str, Any] = {name: str(home / name) for name in inputs}
        yield replace(job, stage_dir=str(stage), **local)
    # Ranks of this node share the directory.
    wait_for_ranks()
    shutil.rmtree(home, ignore_errors=True)


def _plan(store: Store) -> _Plan:
    names = {entry.name for entry in store.list(CHECKPOINT_DIR)}
    complete = (name.split("/")[1] for name in names if name.endswith(f"/{MANIFEST}"))
    return _Plan(uuid.uuid4().hex[:8], tuple(sorted(complete, reverse=True)))


def _prepare(store: Store, plan: _Plan, inputs: Mapping[str, str]) -> Path:
    """Download what the job reads, once for each node, into the attempt's directory there."""
    jobs = scratch_root() / "jobs"
    jobs.mkdir(exist_ok=True)
    stage_key = hashlib.sha256(store.uri.encode()).hexdigest()[:12]
    home = jobs / f"{stage_key}-{plan.token}"
    with (jobs / f"{stage_key}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if home.exists():
            return home
        for earlier in jobs.glob(f"{stage_key}-*"):
            shutil.rmtree(earlier, ignore_errors=True)
        unfinished = home.with_name(f"{home.name}.unfinished")
        _download(store, plan, inputs, unfinished)
        unfinished.rename(home)
    return home


def _download(store: Store, plan: _Plan, inputs: Mapping[str, str], home: Path) -> None:
    stage = home / "stage"
    stage.mkdir(parents=True)
    for name, uri in inputs.items():
        download_tree(Store(uri), "", home / name, marker=None)
    log = store.read(METRIC_LOG)
    if log is not None:
        (stage / METRIC_LOG).write_bytes(log)
    faults = []
    for name in plan.checkpoints:
        local = stage / CHECKPOINT_DIR / name
        try:
            download_tree(store, f"{CHECKPOINT_DIR}/{name}", local)
            verify_checkpoint(local)
        except CheckpointError as error:
            logger.warning("%s; trying the checkpoint before it", error.message)
            faults.append(error.message)
            shutil.rmtree(local, ignore_errors=True)
        else:
            return
    if faults:
        raise CheckpointError(
            f"no checkpoint of this stage is good: {'; '.join(faults)}",
            remedy=f"delete {CHECKPOINT_DIR} in the stage's directory to train it from the start",
        )
