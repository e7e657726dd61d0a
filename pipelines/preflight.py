"""What can be found wrong before anything starts, so that no hour of training is lost to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.errors import ConfigError, ConversionError

from .report import RESERVED_LABELS
from .sizes import BYTES_FP32, GIB, length_faults, plan_skeleton, start_skeleton

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from .workspace import Workspace


def check_before_start(config: RunConfig, workspace: Workspace) -> None:
    """Read the data, find the start model, and see that they fit the recipe.

    Args:
        config: the run's configuration.
        workspace: finds data and start model.

    Raises:
        ConfigError: if a comparison's name is taken, or experts or lengths do not fit the model.
        DataError: if the data cannot be used.
        ConversionError: if the model cannot be read or has no feed-forward layers that we know.
    """
    _check_labels(config)
    workspace.console.note(f"{config.name}: results in {workspace.root}")
    num_parameters = _check_data_and_model(config, workspace)
    warn_of_little_space(workspace, num_parameters, num_trained=2 + len(config.compare))


def check_before_submit(config: RunConfig, workspace: Workspace) -> None:
    """See that data, model and recipe fit, on a machine that only submits the run.

    Args:
        config: the run's configuration.
        workspace: finds data and start model; nothing is written into it.

    Raises:
        ConfigError: if a comparison's name is taken, or experts or lengths do not fit the model.
        DataError: if the data cannot be used.
        ConversionError: if the model cannot be read or has no feed-forward layers that we know.
    """
    _check_labels(config)
    teacher = config.model.teacher
    travels = teacher.startswith("package:") or Path(teacher).is_dir()
    if config.data.source == "hub" or not travels:
        workspace.console.note("data or model come from the hub: the job checks them")
        return
    _check_data_and_model(config, workspace)


def _check_labels(config: RunConfig) -> None:
    taken = sorted(RESERVED_LABELS.intersection(config.compare))
    if taken:
        raise ConfigError(
            [
                f"compare.{label}: this name has another meaning in report.json; choose another."
                for label in taken
            ]
        )


def _check_data_and_model(config: RunConfig, workspace: Workspace) -> int:
    """Check them against each other and give the model's number of parameters."""
    splits = workspace.splits
    left_out = f", {splits.num_near_copies} near copies left out" if splits.num_near_copies else ""
    workspace.console.note(
        f"data: {splits.source}; {len(splits.train)} to train, {len(splits.dev)} for dev{left_out}"
    )
    model = start_skeleton(workspace, splits.task.num_labels)
    faults = length_faults(model, config)
    for label in ("", *config.compare):
        try:
            plan_skeleton(model, config.resolve_comparison(label) if label else config)
        except ConversionError as error:
            prefix = f"compare.{label}: " if label else ""
            faults.append(f"{prefix}{error.message}; {error.remedy}.")
    if faults:
        raise ConfigError(faults, source=f"{config.name} and {config.model.teacher}")
    return sum(parameter.numel() for parameter in model.parameters())


def warn_of_little_space(workspace: Workspace, num_parameters: int, *, num_trained: int) -> None:
    """Warn where a whole run may not fit on the disk; finished stages may make it fit all the same.

    Args:
        workspace: knows where results go.
        num_parameters: of the start model.
        num_trained: models that are trained: teacher, student and comparisons.
    """
    # Every model, and of the one in training up to three checkpoints (two kept, one being
    # written) with two moments each; a finished stage keeps none.
    needed_bytes = (num_trained + 3 * 3) * num_parameters * BYTES_FP32
    free_bytes = shutil.disk_usage(workspace.root).free
    if free_bytes < needed_bytes:
        workspace.console.warn(
            f"a whole run may need {needed_bytes / GIB:.1f} GiB, and {free_bytes / GIB:.1f} GiB "
            f"are free where {workspace.root} lies"
        )
