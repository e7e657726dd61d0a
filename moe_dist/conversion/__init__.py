"""Dense model to mixture of experts: score neurons, plan the split, convert."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.conversion.convert import dense_to_moe
    from moe_dist.conversion.importance import score_importance
    from moe_dist.conversion.output_fit import fit_outputs
    from moe_dist.conversion.partition import PARTITIONS, PartitionPlan, plan_partition
    from moe_dist.conversion.shrink import ShrinkPlan, plan_shrink, shrink_model

__all__ = [
    "PARTITIONS",
    "PartitionPlan",
    "ShrinkPlan",
    "dense_to_moe",
    "fit_outputs",
    "plan_partition",
    "plan_shrink",
    "score_importance",
    "shrink_model",
]

_HOMES = {
    "PARTITIONS": "partition",
    "PartitionPlan": "partition",
    "ShrinkPlan": "shrink",
    "dense_to_moe": "convert",
    "fit_outputs": "output_fit",
    "plan_partition": "partition",
    "plan_shrink": "shrink",
    "score_importance": "importance",
    "shrink_model": "shrink",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that registering with the Auto classes costs `import moe_dist` no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
