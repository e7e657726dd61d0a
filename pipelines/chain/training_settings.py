"""From recipe sections to what fingerprints are made of: plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_dist.config.setting_kinds import settings_of_kind

if TYPE_CHECKING:
    from moe_dist.config import RunConfig, TrainConfig

# A dense model has no experts for which they could matter.
_EXPERT_KEYS = frozenset({"expert_learning_rate_scale"})


def training_settings(
    config: RunConfig, train: TrainConfig, *, has_experts: bool = True
) -> dict[str, Any]:
    """Return the training settings that a stage's fingerprint covers.

    Placement is left out: a run that continues on other hardware is the same run.
    """
    learning = settings_of_kind(train)
    if not has_experts:
        learning = {key: value for key, value in learning.items() if key not in _EXPERT_KEYS}
    return {"seed": config.seed, "max_length": config.model.max_length, "train": learning}
