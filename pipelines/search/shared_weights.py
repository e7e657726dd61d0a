"""Weights that trials of a population hand on: step checkpoints in the trials' directories."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.distributed.checkpoint_files import step_directory
from moe_dist.jobs.results import CHECKPOINT_DIR

from .trial_stages import DISTILL

if TYPE_CHECKING:
    from moe_dist.jobs.distill import DistillJob


def shared_checkpoints(job: DistillJob, steps: Sequence[int], num_steps: int) -> DistillJob:
    """Let a trial save, after these steps, what others may go on from."""
    # A weak trial may begin to copy when the strong one has reached the next rung already.
    train = job.train.model_copy(update={"checkpoint_every": num_steps, "keep_checkpoints": 2})
    return replace(job, train=train, checkpoint_at=tuple(steps))


def checkpoint_at(directory: Path, step: int) -> Path:
    """Return the directory of a trial's checkpoint after so many optimizer steps."""
    return step_directory(directory / CHECKPOINT_DIR, step)


def take_over(checkpoint: str, directory: Path) -> None:
    """Leave a training one checkpoint to go on from, perhaps another trial's; none if empty."""
    own = directory / CHECKPOINT_DIR
    if checkpoint and Path(checkpoint).parent == own:
        return
    shutil.rmtree(own, ignore_errors=True)
    if checkpoint:
        shutil.copytree(checkpoint, own / Path(checkpoint).name)


def remove_weights(trials: Path) -> None:
    """Remove the checkpoints of all trials; a population that is over needs none."""
    for path in trials.glob(f"*/{DISTILL}/{CHECKPOINT_DIR}"):
        shutil.rmtree(path, ignore_errors=True)
