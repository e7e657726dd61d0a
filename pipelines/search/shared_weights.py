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
    """Let a trial save what others may go on from.

    Args:
        job: the trial's training.
        steps: after which it is compared, the end left out.
        num_steps: of its training.

    Returns:
        The job with its checkpoints.
    """
    # A weak trial may begin to copy when the strong one has reached the next rung already.
    train = job.train.model_copy(update={"checkpoint_every": num_steps, "keep_checkpoints": 2})
    return replace(job, train=train, checkpoint_at=tuple(steps))


def checkpoint_at(directory: Path, step: int) -> Path:
    """Name a trial's checkpoint.

    Args:
        directory: of the trial's training.
        step: optimizer steps done.

    Returns:
        Its directory.
    """
    return step_directory(directory / CHECKPOINT_DIR, step)


def take_over(checkpoint: str, directory: Path) -> None:
    """Make a checkpoint the only one that a trial's training can go on from.

    Args:
        checkpoint: its own or another trial's; empty to begin anew.
        directory: of the trial's training.
    """
    own = directory / CHECKPOINT_DIR
    if checkpoint and Path(checkpoint).parent == own:
        return
    shutil.rmtree(own, ignore_errors=True)
    if checkpoint:
        shutil.copytree(checkpoint, own / Path(checkpoint).name)


def remove_weights(trials: Path) -> None:
    """Remove the checkpoints of all trials; a population that is over needs none.

    Args:
        trials: the directory of the sweep's trials.
    """
    for path in trials.glob(f"*/{DISTILL}/{CHECKPOINT_DIR}"):
        shutil.rmtree(path, ignore_errors=True)
