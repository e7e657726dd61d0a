"""Scores, kinds of tokens and fitted outputs in bfloat16 are those of float32 but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, fit_outputs, plan_partition, score_importance
from moe_dist.conversion.token_clusters import token_clusters
from moe_dist.distributed.update import Precision
from moe_dist.jobs.precision import computing_in
from tests.conversion.dense_models import NUM_NEURONS, random_scores, tiny_model, token_batch

CPU = torch.device("cpu")
FAMILIES = ("bert", "llama", "t5")


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """The share of the better half of neurons that both have."""
    half = NUM_NEURONS // 2
    best = [set(scores.topk(half).indices.tolist()) for scores in (first, second)]
    return len(best[0] & best[1]) / half


def batches_of(model: Any) -> list[dict[str, torch.Tensor]]:
    batches = [token_batch(seed=seed) for seed in range(4)]
    for batch in batches:
        batch["labels"] = (
            batch["input_ids"] if model.config.model_type != "bert" else torch.tensor([0, 1, 0, 1])
        )
    return batches


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_keep_their_order(family: str) -> None:
    model = tiny_model(family)
    batches = batches_of(model)
    exact = score_importance(model, batches)
    with computing_in("bf16", CPU, model):
        found = score_importance(model, batches)
    for expected_F, found_F in zip(exact, found, strict=True):
        assert found_F.dtype == torch.float32
        assert overlap(expected_F, found_F) >= 0.85
        assert not torch.equal(expected_F, found_F)
        assert float(torch.corrcoef(torch.stack([expected_F, found_F]))[0, 1]) > 0.98


def test_kinds_of_tokens_need_the_same_neurons() -> None:
    model = tiny_model("llama")
    batches = [batches_of(model)]
    exact = token_clusters(model, batches, 2, seed=0)
    with computing_in("bf16", CPU, model):
        found = token_clusters(model, batches, 2, seed=0)
    for expected_EF, found_EF in zip(exact.scores, found.scores, strict=True):
        for expected_F, found_F in zip(expected_EF, found_EF, strict=True):
            assert overlap(expected_F, found_F) >= 0.75


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_outputs_are_fitted_as_well(family: str) -> None:
    """The same error is left, as near as the answers' own rounding."""
    model = tiny_model(family).eval()
    batches = [token_batch(seed=seed) for seed in range(6)]
    plan = plan_partition(
        random_scores(model),
        num_experts=2,
        expert_size=NUM_NEURONS // 2,
        num_shared_neurons=0,
        method="importance",
    )

    def error(precision: Precision | None) -> float:
        student = dense_to_moe(model, plan, router="hash_random").eval()
        if precision is not None:
            with computing_in(precision, CPU, student):
                fit_outputs(student, model, [batches])
        with torch.no_grad():
            return sum(
                float((student(**one).logits - model(**one).logits).square().mean())
                for one in batches
            )

    unfitted, exact, half = error(None), error("fp32"), error("bf16")
    assert exact < 0.9 * unfitted
    assert abs(half - exact) < 0.05 * (unfitted - exact)
