"""Small students that graphs are made of."""

from __future__ import annotations

from typing import Any

import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from tests.conversion.dense_models import VOCAB_SIZE, random_scores, tiny_model

POOLED = {"sentence_pooling": "mean", "sentence_normalised": True}


def student(family: str = "bert", kind: str = "", **options: Any) -> Any:
    """Three experts in one layer of a family."""
    model = tiny_model(family, kind, num_hidden_layers=1, **options.pop("config", {}))
    plan = plan_partition(
        random_scores(model),
        num_experts=3,
        expert_size=options.pop("expert_size", 12),
        num_shared_neurons=options.pop("num_shared", 6),
        tie_shared=options.pop("tie_shared", True),
        method=options.pop("method", "importance"),
    )
    return dense_to_moe(model, plan, **options).eval()


def of_one_token(token: int) -> torch.Tensor:
    """A table by which the text that graphs are traced with has but one expert."""
    return torch.where(torch.arange(VOCAB_SIZE) == token, 0, torch.arange(VOCAB_SIZE) % 2 + 1)
