"""Tiny students whose experts are made smaller."""

from __future__ import annotations

from typing import Any

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.moe.layer import moe_layers
from tests.conversion.dense_models import random_scores, tiny_model


def student(family: str = "bert", **options: Any) -> Any:
    """Four experts of a tiny model, a BERT if not said; of its 32 neurons each has 14 or shares."""
    model = tiny_model(family)
    plan = plan_partition(
        random_scores(model),
        num_experts=options.pop("num_experts", 4),
        expert_size=options.pop("expert_size", 14),
        num_shared_neurons=options.pop("num_shared", 8),
        tie_shared=options.pop("tie_shared", False),
        method=options.pop("method", "importance"),
    )
    return dense_to_moe(model, plan, **options)


def even(model: Any, *shares: float) -> dict[str, list[float]]:
    number = moe_layers(model)[0].num_experts
    return {layer.name: list(shares or [1 / number] * number) for layer in moe_layers(model)}
