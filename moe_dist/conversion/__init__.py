"""Dense model to mixture of experts: score neurons, plan the split, convert."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.conversion.convert import dense_to_moe
    from moe_dist.conversion.importance import score_importance
    from moe_dist.conversion.partition import PARTITIONS, PartitionPlan, plan_partition

__all__ = [
    "PARTITIONS",
    "PartitionPlan",
    "dense_to_moe",
    "plan_partition",
    "score_importance",
]

_HOMES = {
    "PARTITIONS": "partition",
    "PartitionPlan": "partition",
    "dense_to_moe": "convert",
    "plan_partition": "partition",
    "score_importance": "importance",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that registering with the Auto classes costs `import moe_dist` no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
