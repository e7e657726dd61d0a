"""From recipe sections to what worker jobs and fingerprints are made of: plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_dist.config.data_section import TASK_KEYS
from moe_dist.config.kinds import settings_of_kind

if TYPE_CHECKING:
    from moe_dist.config import RunConfig, TrainConfig

# A dense model has no experts for which they could matter.
_EXPERT_KEYS = frozenset({"expert_learning_rate_scale"})


def data_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the arguments of `load_rows`.

    Args:
        config: the run's configuration.

    Returns:
        Plain values; without `tasks` they are those of `load_splits`.
    """
    data = config.data.model_dump(mode="json")
    kept = TASK_KEYS if config.data.source == "tasks" else set(data) - set(TASK_KEYS)
    return {**{key: data[key] for key in data if key in kept}, "seed": config.seed}


def data_job(config: RunConfig, directory: str) -> dict[str, Any]:
    """Return the part that the payloads of all jobs share.

    Args:
        config: the run's configuration.
        directory: where rank 0 writes; a path or a URI.

    Returns:
        Plain values, as `moe_dist.training.payloads.DataJob` names them.
    """
    return {
        "data": data_arguments(config),
        "max_length": config.model.max_length,
        "cache_dir": None,
        "stage_dir": directory,
        "seed": config.seed,
        "use_gpu": config.parallel.use_gpu,
    }


def training_job(config: RunConfig, train: TrainConfig, directory: str) -> dict[str, Any]:
    """Return what fine-tuning and distillation payloads share.

    Args:
        config: the run's configuration.
        train: the training settings of this stage.
        directory: where rank 0 writes; a path or a URI.

    Returns:
        Plain values.
    """
    return {
        **data_job(config, directory),
        "train": train.model_dump(mode="json"),
        "parallel": config.parallel.model_dump(mode="json"),
    }


def training_settings(
    config: RunConfig, train: TrainConfig, *, has_experts: bool = True
) -> dict[str, Any]:
    """Return the training settings that a stage's fingerprint covers.

    Settings of placement are left out: a checkpoint loads at any of them, so a run that continues
    on other hardware is the same run.

    Args:
        config: the run's configuration.
        train: the training settings of the stage.
        has_experts: whether the model that is trained may have routed experts.

    Returns:
        Plain values.
    """
    learning = settings_of_kind(train)
    if not has_experts:
        learning = {key: value for key, value in learning.items() if key not in _EXPERT_KEYS}
    return {"seed": config.seed, "max_length": config.model.max_length, "train": learning}
