"""Co-activation and importance by cluster against slow counts, and what they are good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import plan_partition, score_importance
from moe_dist.conversion.activity import cluster_importance, coactivation
from moe_dist.conversion.families import find_slots
from tests.conversion.dense_models import (
    FAMILY_NAMES,
    NUM_NEURONS,
    labelled_batch,
    tiny_model,
    token_batch,
)


def labelled_batches(model: Any) -> list[dict[str, Tensor]]:
    return [labelled_batch(model, seed=seed) for seed in (1, 2)]


def activations(model: Any, layer: int, batch: dict[str, Tensor]) -> Tensor:
    """What the second linear layer of an FFN reads, (B, S, F)."""
    seen: list[Tensor] = []
    slot = find_slots(model)[layer]
    handle = slot.linear_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_coactivation_counts_real_tokens_one_by_one(family: str) -> None:
    model = tiny_model(family)
    batches = labelled_batches(model)
    last = len(find_slots(model)) - 1
    neurons = {0: torch.tensor([5, 2, 9]), last: torch.tensor([0, 31])}
    found = coactivation(model, batches, neurons)
    for layer, ids in neurons.items():
        in_decoder = model.config.is_encoder_decoder and layer == last
        sums = torch.zeros(len(ids), len(ids))
        for batch in batches:
            value = activations(model, layer, batch)
            for sample in range(value.shape[0]):
                for token in range(value.shape[1]):
                    if in_decoder or batch["attention_mask"][sample, token]:
                        fires = value[sample, token, ids].abs()
                        sums += torch.outer(fires, fires)
        norms = sums.diagonal().sqrt().clamp(min=1e-30)
        torch.testing.assert_close(found[layer], sums / torch.outer(norms, norms))


def test_importance_by_cluster_adds_up_to_importance() -> None:
    model = tiny_model("bert")
    batches = labelled_batches(model)
    by_cluster = cluster_importance(model, batches, 2, seed=0)
    whole = score_importance(model, batches)
    for scores_EF, score_F in zip(by_cluster, whole, strict=True):
        assert scores_EF.shape == (2, NUM_NEURONS)
        torch.testing.assert_close(scores_EF.sum(0), score_F)
        assert not torch.allclose(scores_EF[0], scores_EF[1], rtol=0.1)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("bert").train()
    batches = labelled_batches(model)
    coactivation(model, batches, {0: torch.arange(4)})
    cluster_importance(model, batches, 2, seed=0)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


NUM_GROUPS = 4


def structured_bert() -> Any:
    """An FFN whose groups of neurons answer to groups of token ids, in mixed order."""
    model = tiny_model("bert", num_hidden_layers=1, hidden_act="relu")
    generator = torch.Generator().manual_seed(3)
    slot = find_slots(model)[0]
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:NUM_GROUPS]
    group_F = torch.randperm(NUM_NEURONS, generator=generator) % NUM_GROUPS
    with torch.no_grad():
        weights = slot.weights()
        assert weights.b_in is not None
        noise = 0.1 * torch.randn(weights.w_in.shape, generator=generator)
        weights.w_in.copy_(directions[group_F] + noise)
        weights.b_in.fill_(-0.5)
        # Attention and its residual out of the way: the FFN reads the token's own direction.
        block = model.bert.encoder.layer[0].attention.output
        block.dense.weight.zero_()
        block.dense.bias.zero_()
        embeddings = model.bert.embeddings
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.word_embeddings.weight.copy_(
            directions[torch.arange(embeddings.word_embeddings.num_embeddings) % NUM_GROUPS]
        )
    return model


def reconstruction_error(model: Any, plan: Any) -> float:
    """Mean squared error of the FFN's output, each token at the expert that serves it best."""
    slot = find_slots(model)[0]
    value_TF = activations(model, 0, {"input_ids": torch.arange(3, 23).view(4, 5)}).flatten(0, 1)
    w_out = slot.weights().w_out.detach()
    errors = []
    for ids in plan.partitions[0].expert_ids:
        lost_TF = value_TF.clone()
        lost_TF[:, ids] = 0.0
        errors.append((lost_TF @ w_out.T).square().mean(1))
    return float(torch.stack(errors).min(0).values.mean())


def test_kmeans_and_coactivation_beat_random_before_any_training() -> None:
    model = structured_bert()
    batches = [{"input_ids": token_batch(8, seed=seed)["input_ids"]} for seed in range(3)]
    scores = [torch.ones(NUM_NEURONS)]
    errors = {}
    for method in ("kmeans", "coactivation", "random"):
        plan = plan_partition(
            scores,
            num_experts=NUM_GROUPS,
            expert_size=NUM_NEURONS // NUM_GROUPS,
            num_shared_neurons=0,
            method=method,
            model=model,
            batches=batches,
        )
        errors[method] = reconstruction_error(model, plan)
    assert errors["kmeans"] < 0.1 * errors["random"]
    assert errors["coactivation"] < 0.1 * errors["random"]
