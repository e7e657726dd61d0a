"""Small students that graphs are made of."""

from __future__ import annotations

from typing import Any

import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.moe.layer import moe_layers
from moe_dist.moe.routing import record_routing
from tests.conversion.dense_models import VOCAB_SIZE, logits_of, random_scores, tiny_model

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


def hashed_student() -> Any:
    """A student by whose table the text that graphs are traced with has but one expert."""
    model = student(router="hash_random")
    for layer in moe_layers(model):
        layer.router.table.copy_(
            torch.where(
                torch.arange(VOCAB_SIZE) == VOCAB_SIZE - 1, 0, torch.arange(VOCAB_SIZE) % 2 + 1
            )
        )
    return model


def check_that_experts_follow_the_data(hashed: Any, graph: Any) -> None:
    """Ask a graph of a `hashed_student` for texts of each expert, and of all of them mixed."""
    used = set()
    for tokens in ([VOCAB_SIZE - 1], [4], [5], [4, 5, VOCAB_SIZE - 1, 4, 7, 8], [5, 7, 9]):
        batch = {"input_ids": torch.tensor([tokens])}
        with record_routing() as record:
            expected = logits_of(hashed, batch)
        used.add(tuple(record.entries[0].routing.expert_ids.unique().tolist()))
        torch.testing.assert_close(logits_of(graph, batch), expected, rtol=1e-5, atol=1e-5)
    assert used == {(0,), (1,), (2,), (0, 1, 2)}
