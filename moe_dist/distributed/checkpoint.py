"""Canonical checkpoints: whole tensors by name, loadable at any world, ep_size and ZeRO stage.

    <directory>/step-00000120/
        model.safetensors      parameters and buffers, experts in global order
        optimizer.safetensors  exp_avg.<name> and exp_avg_sq.<name>
        rng.safetensors        rank.<r>.cpu, rank.<r>.cuda
        state.json             step, optimizer steps, sizes of the run, the caller's own state
        manifest.json          SHA-256 of each file and of each expert

Nothing is pickled. A checkpoint is written beside its place and renamed when complete, so a
killed writer leaves the older ones as they were.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.distributed.agreement import on_every_rank, on_rank_zero
from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.gathering import gather_model, gather_moments, gather_rng
from moe_dist.distributed.manifest import (
    FORMAT_VERSION,
    check_manifest,
    expert_digests,
    flush_to_disk,
    write_json,
    write_manifest,
)
from moe_dist.distributed.parameter_groups import moe_layers
from moe_dist.distributed.restore import MODEL_FILE, OPTIMIZER_FILE, RNG_FILE, STATE_FILE, read_into
from moe_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED_PREFIX = ".unfinished-"


def save_checkpoint(
    directory: Path, engine: TrainEngine, *, step: int, state: dict[str, Any], keep: int = 2
) -> Path:
    """Write a checkpoint; all ranks call it together, rank 0 writes.

    Older checkpoints beyond the newest `keep` are removed, and so are those of later steps, which
    belong to a course of training that was left.

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
    directory = Path(directory)
    place = directory / f"step-{step:08d}"
    model = gather_model(engine)
    moments = gather_moments(engine)
    rng = gather_rng(engine)

    def write() -> None:
        sizes = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "optimizer_steps": engine.steps_done,
            "world_size": engine.world_size,
            "ep_size": engine.ep_size,
            "zero_stage": engine.zero_stage,
            "state": state,
        }
        layers = {
            name: [f"{name}.experts.{leaf}" for leaf, _ in layer.experts.named_parameters()]
            for name, layer in moe_layers(engine.module)
        }
        tensors = {MODEL_FILE: model, OPTIMIZER_FILE: moments, RNG_FILE: rng}
        _write_directory(place, tensors, sizes, expert_digests(model, layers))
        _prune(directory, step, keep)

    on_rank_zero(engine, write)
    return place


def load_checkpoint(directory: Path, engine: TrainEngine) -> dict[str, Any] | None:
    """Load a checkpoint, written at whatever size; all ranks call it together.

    Args:
        directory: a checkpoint, or a directory of checkpoints, of which the newest good one is
            taken; damaged ones are named in a warning.
        engine: whose model and optimizer are set.

    Returns:
        The caller's state as it was saved, with `step` in it; None if there is no checkpoint.

    Raises:
        CheckpointError: if the named checkpoint is damaged, if all are, or if it is of another
            model.
    """
    directory = Path(directory)
    chosen = on_rank_zero(engine, lambda: _choose(directory))
    if chosen is None:
        return None
    saved = on_every_rank(engine, lambda: read_into(Path(chosen), engine))
    return {**saved["state"], "step": saved["step"]}


def verify_checkpoint(step_dir: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Args:
        step_dir: the checkpoint's directory.

    Raises:
        CheckpointError: naming the missing, damaged or unsafe file.
    """
    step_dir = Path(step_dir)
    if not step_dir.is_dir():
        raise CheckpointError(f"{step_dir} is not a checkpoint", remedy="check the path")
    check_manifest(step_dir)


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, newest first.

    Args:
        directory: as given to `save_checkpoint`.

    Returns:
        Their directories; none if there are none.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _step_of(path) is not None]
    return sorted(found, key=lambda path: _step_of(path) or 0, reverse=True)


def _step_of(path: Path) -> int | None:
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def _choose(directory: Path) -> str | None:
    if _step_of(directory) is not None:
        verify_checkpoint(directory)
        return str(directory)
    faults = []
    for path in list_checkpoints(directory):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            faults.append(error.message)
            logger.warning("%s; trying the checkpoint before it", error.message)
        else:
            return str(path)
    if faults:
        raise CheckpointError(
            f"no checkpoint in {directory} is good: " + "; ".join(faults),
            remedy=f"delete {directory} to train from the start",
        )
    return None


def _write_directory(
    place: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    state: Mapping[str, Any],
    experts: Mapping[str, str],
) -> None:
    unfinished = place.parent / f"{_UNFINISHED_PREFIX}{place.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, values in tensors.items():
            save_file(values, unfinished / name)
            flush_to_disk(unfinished / name)
        write_json(unfinished / STATE_FILE, state)
        write_manifest(unfinished, experts)
        flush_to_disk(unfinished)
        replaced = unfinished.with_name(f"{unfinished.name}-replaced")
        if place.exists():
            os.rename(place, replaced)
        os.rename(unfinished, place)
        flush_to_disk(place.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"{place} could not be written: {error}",
            remedy="free space or fix the rights there, then start the same command again; "
            "older checkpoints are untouched",
        ) from error


def _prune(directory: Path, step: int, keep: int) -> None:
    for path in directory.glob(f"{_UNFINISHED_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    checkpoints = list_checkpoints(directory)
    later = [path for path in checkpoints if (_step_of(path) or 0) > step]
    older = [path for path in checkpoints if (_step_of(path) or 0) <= step]
    for path in later + older[max(1, keep) :]:
        shutil.rmtree(path, ignore_errors=True)
