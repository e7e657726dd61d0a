"""Importance of experts' neurons: equal to one sample after another with weight gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition, score_importance
from moe_dist.conversion.expert_importance import score_expert_importance
from moe_dist.conversion.importance import accepted_inputs, task_losses
from moe_dist.errors import ConversionError
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import moe_layers
from tests.conversion.dense_models import random_scores, tiny_model, token_batch
from tests.moe.merged import draw_gates


def labelled(model: Any) -> dict[str, torch.Tensor]:
    batch = token_batch()
    if hasattr(model, "classifier"):
        return batch | {"labels": torch.tensor([0, 1, 1, 0])}
    ids = batch["input_ids"]
    return batch | {"labels": ids.masked_fill(ids == 0, -100)}


def student(family: str = "bert", *, num_experts: int = 3, tied: int = 0, **options: Any) -> Any:
    model = tiny_model(family)
    plan = plan_partition(
        random_scores(model),
        num_experts=num_experts,
        expert_size=options.pop("expert_size", 10),
        num_shared_neurons=tied,
        tie_shared=tied > 0,
    )
    return dense_to_moe(model, plan, **options)


def by_weight_gradients(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The definition: a backward for each sample, and gradients of all weights."""
    layers = moe_layers(model)
    totals = [torch.zeros(())] * len(layers)
    for sample in range(len(batch["labels"])):
        own = {name: value[sample : sample + 1] for name, value in batch.items()}
        model.zero_grad()
        task_losses(model, model(**accepted_inputs(model, own)), own).sum().backward()
        for index, layer in enumerate(layers):
            parts = [] if layer.shared is None else [_of(layer.shared)]
            parts.append(_of(layer.experts))
            totals[index] = totals[index] + torch.cat(parts).abs()
    return totals


def _of(experts: Experts) -> torch.Tensor:
    if experts.w_in is None or experts.w_out is None:
        return torch.zeros(0)
    total = (experts.w_out * _grad(experts.w_out)).sum(dim=1)
    for weight in (experts.w_in, experts.w_gate):
        if weight is not None:
            total = total + (weight * _grad(weight)).sum(dim=2)
    return total.detach().flatten()


def _grad(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


CASES = {
    "hash": {"router": "hash_random"},
    "gate": {"router": "token_gate"},
    "probability": {"router": "token_gate", "gate_scale": "probability"},
    "two of three": {"router": "token_gate", "top_k": 2},
    "tied": {"router": "token_gate", "tied": 4},
    "all tied": {"router": "token_gate", "tied": 10},
    "dense": {"num_experts": 1},
    "merged by task": {"router": "merged_task", "top_k": 2, "tied": 4},
    "merged by sequence": {"router": "merged_sequence", "top_k": 2},
    "merged, with a token's part": {"router": "merged_token", "top_k": 3, "merge_gates": "one"},
}


@pytest.mark.parametrize("case", CASES)
def test_one_backward_a_batch_equals_a_loop_over_samples(case: str) -> None:
    model = student(**CASES[case]).eval()
    draw_gates(model)
    batch = labelled(model)
    expected = by_weight_gradients(model, batch)
    found = score_expert_importance(model, [batch])
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert all(float(one.sum()) > 0 for one in found)


@pytest.mark.parametrize("router", ["token_gate", "merged_sequence"])
@pytest.mark.parametrize("family", ["gpt2", "t5", "t5-gated", "bart"])
def test_it_holds_in_every_family(family: str, router: str) -> None:
    options = {"top_k": 2, "segment_length": 2} if router == "merged_sequence" else {}
    model = student(family, router=router, tied=4, **options).eval()
    if router == "merged_sequence":
        draw_gates(model)
    batch = labelled(model)
    expected = by_weight_gradients(model, batch)
    found = score_expert_importance(model, [batch])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert float(other.sum()) > 0, "a trivial case proves nothing"


def test_batches_add_up_and_the_model_stays() -> None:
    model = student(router="token_gate", tied=4)
    batch = labelled(model)
    half = len(batch["labels"]) // 2
    parts = [{k: v[:half] for k, v in batch.items()}, {k: v[half:] for k, v in batch.items()}]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    whole, summed = score_expert_importance(model, [batch]), score_expert_importance(model, parts)
    for one, other in zip(whole, summed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in moe_layers(model))


def test_a_whole_dense_layer_as_one_expert_scores_as_the_dense_model_does() -> None:
    model = tiny_model("bert")
    scores = random_scores(model)
    plan = plan_partition(scores, num_experts=1, expert_size=32, num_shared_neurons=0)
    batch = labelled(model)
    found = score_expert_importance(dense_to_moe(model, plan), [batch])
    for dense, own, part in zip(
        score_importance(model, [batch]), found, plan.partitions, strict=True
    ):
        torch.testing.assert_close(own, dense[part.expert_ids[0]], rtol=1e-4, atol=1e-7)


def test_dense_models_and_no_batches_are_refused() -> None:
    with pytest.raises(ConversionError, match="no experts"):
        score_expert_importance(tiny_model("bert"), [])
    model = student(router="token_gate")
    with pytest.raises(ConversionError, match="no batches"):
        score_expert_importance(model, [])
    with torch.no_grad():
        moe_layers(model)[0].experts.w_out[0, 0, 0] = torch.nan
    with pytest.raises(ConversionError, match="not finite"):
        score_expert_importance(model, [labelled(model)])
