"""From recipe sections to what fingerprints are made of: plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.config import ObjectivesConfig, RunConfig, TrainConfig

# They change when and how things are observed, not what is learned.
_OBSERVATION_KEYS = frozenset(
    {
        "eval_every",
        "eval_batch_size",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "step_timeout_s",
    }
)
# They change where the work is done; a checkpoint fits any of them.
_PLACEMENT_KEYS = frozenset({"gradient_checkpointing"})
# A dense model has no experts for which they could matter.
_EXPERT_KEYS = frozenset({"expert_learning_rate_scale"})


def training_settings(
    config: RunConfig, train: TrainConfig, *, has_experts: bool = True
) -> dict[str, Any]:
    """Return the training settings that a stage's fingerprint covers.

    Worker counts, ZeRO stage and the like are left out: a checkpoint loads at any of them, so a
    run that continues on other hardware is the same run.

    Args:
        config: the run's configuration.
        train: the training settings of the stage.
        has_experts: whether the model that is trained may have routed experts.

    Returns:
        Plain values.
    """
    skipped = _OBSERVATION_KEYS | _PLACEMENT_KEYS
    if not has_experts:
        skipped |= _EXPERT_KEYS
    return {
        "seed": config.seed,
        "max_length": config.model.max_length,
        "train": {
            key: value for key, value in train.model_dump(mode="json").items() if key not in skipped
        },
    }


# Weights that were there from the start, and stand in the fingerprints of earlier results.
_FIRST_WEIGHTS = frozenset(
    {"task_weight", "hidden_weight", "kl_weight", "load_balancing_weight", "z_loss_weight"}
)
# What only some losses read.
_KEYS_OF_LOSSES: dict[str, frozenset[str]] = {
    "adversarial_regularizer": frozenset({"adversarial_weight"}),
    "adversarial_learning_rate": frozenset({"adversarial_weight"}),
    "adversarial_warmup_fraction": frozenset({"adversarial_weight"}),
    "alignment_pooling": frozenset({"alignment_weight", "adversarial_weight"}),
}
# Keys that came later, and the value with which all is as it was before them.
_IDLE_VALUES = {"hidden_layers": "all", "dropout": None}


def distill_settings(distill: ObjectivesConfig) -> dict[str, Any]:
    """Return the part of the `distill` section that changes what is learned.

    So a loss that is not used, or one that a later version brings, redoes nothing.

    Args:
        distill: the section.

    Returns:
        Plain values.
    """
    settings = {
        key: value
        for key, value in distill.model_dump(mode="json").items()
        if key in _FIRST_WEIGHTS or not key.endswith("_weight") or value != 0
    }
    for key, weights in _KEYS_OF_LOSSES.items():
        if not weights & set(settings):
            del settings[key]
    return {
        key: value
        for key, value in settings.items()
        if key not in _IDLE_VALUES or value != _IDLE_VALUES[key]
    }
