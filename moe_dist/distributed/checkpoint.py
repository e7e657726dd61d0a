"""Canonical checkpoints: whole tensors by name, loadable at any world, ep_size and ZeRO stage.

    <directory>/step-00000120/
        model.safetensors      parameters and buffers, experts in global order
        optimizer.safetensors  exp_avg.<name> and exp_avg_sq.<name>
        rng.safetensors        rank.<r>.cpu, rank.<r>.cuda
        state.json             step, optimizer steps, sizes of the run, the caller's own state
        manifest.json          SHA-256 of each file and of each expert

Nothing is pickled. A checkpoint is written beside its place and renamed when complete, so a
killed writer leaves the older ones as they were. Experts are checked when they are saved, when
they are read, and when every rank has its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from moe_dist.distributed.agreement import on_every_rank, on_rank_zero
from moe_dist.distributed.checkpoint_files import (
    MODEL_FILE,
    list_checkpoints,
    step_directory,
    step_of,
)
from moe_dist.distributed.checkpoint_writer import CheckpointWriter
from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.integrity import (
    check_file,
    check_spread,
    gather_digests,
    held_digests,
    held_orders,
)
from moe_dist.distributed.manifest import check_manifest, read_experts
from moe_dist.distributed.restore import read_into
from moe_dist.errors import CheckpointError
from moe_dist.moe.digests import by_layer

logger = logging.getLogger(__name__)


def save_checkpoint(
    directory: Path, engine: TrainEngine, *, step: int, state: dict[str, Any], keep: int = 2
) -> Path:
    """Write a checkpoint and wait for it; all ranks call it together, rank 0 writes.

    Older checkpoints beyond the newest `keep` are removed, and so are those of later steps, which
    belong to a trajectory of training that was left.

    Args:
        directory: holds the checkpoints of one run; on storage that all ranks see.
        engine: whose model and optimizer are saved.
        step: number of the step, for the name.
        state: the caller's own plain values (epoch, position, ...), returned by the load.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: on every rank, if it could not be written; nothing half-written stays.
    """
    with CheckpointWriter(directory, engine, keep=keep) as writer:
        writer.save(step, state)
    return step_directory(Path(directory), step)


def load_checkpoint(directory: Path, engine: TrainEngine) -> dict[str, Any] | None:
    """Load a checkpoint, written at whatever size; all ranks call it together.

    Args:
        directory: a checkpoint, or a directory of checkpoints, of which the newest good one is
            taken; damaged ones are named in a warning.
        engine: whose model and optimizer are set.

    Returns:
        The caller's state as it was saved, with `step` in it; None if there is no checkpoint.

    Raises:
        CheckpointError: on every rank, if the named checkpoint is damaged, if all are, if it is of
            another model, or if the ranks do not hold its experts afterwards.
    """
    directory = Path(directory)
    chosen = on_rank_zero(engine, lambda: _choose(directory))
    if chosen is None:
        return None
    # By name: nodes that share no storage hold copies below directories of their own.
    path = directory / chosen
    saved = on_every_rank(engine, lambda: read_into(path, engine))
    expected = on_rank_zero(engine, lambda: by_layer(read_experts(path)))
    held = gather_digests(engine, held_digests(engine.module))
    orders = held_orders(engine.module)
    check_spread(held, expected, ep_size=engine.ep_size, orders=orders)
    return {**saved["state"], "step": saved["step"]}


def verify_checkpoint(step_dir: Path) -> None:
    """Check a checkpoint's files and experts; a CheckpointError names the faulty ones."""
    step_dir = Path(step_dir)
    if not step_dir.is_dir():
        raise CheckpointError(f"{step_dir} is not a checkpoint", remedy="check the path")
    try:
        check_manifest(step_dir)
        check_file(step_dir / MODEL_FILE, read_experts(step_dir))
    except OSError as error:
        raise CheckpointError(
            f"{step_dir} cannot be read: {error}",
            remedy="look after the disk and the rights there, or use another checkpoint",
        ) from error


def _choose(directory: Path) -> str | None:
    """Return the chosen checkpoint's path below `directory`, of whatever machine."""
    if step_of(directory) is not None:
        verify_checkpoint(directory)
        return "."
    faults = []
    for path in list_checkpoints(directory):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            faults.append(error.message)
            logger.warning("%s; trying the checkpoint before it", error.message)
        else:
            return path.name
    if faults:
        raise CheckpointError(
            f"no checkpoint in {directory} is good: " + "; ".join(faults),
            remedy=f"delete {directory} to train from the start",
        )
    return None
