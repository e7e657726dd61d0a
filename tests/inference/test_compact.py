"""Fewer experts and fused neurons: exact where they can be, and joined as said where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.errors import ConversionError
from moe_dist.inference import load_model, save_model
from moe_dist.inference.compact import (
    compact_experts,
    expert_similarity,
    fuse_neurons,
    group_experts,
)
from moe_dist.measure.profile import count_parameters
from moe_dist.moe.layer import moe_layers
from tests.conversion.dense_models import logits_of, random_scores, tiny_model, token_batch


def student(**options: Any) -> Any:
    """Four experts of a tiny BERT; of its 32 neurons each has 14 of its own or shared."""
    model = tiny_model("bert")
    plan = plan_partition(
        random_scores(model),
        num_experts=4,
        expert_size=options.pop("expert_size", 14),
        num_shared_neurons=options.pop("num_shared", 8),
        tie_shared=options.pop("tie_shared", False),
        method=options.pop("method", "importance"),
    )
    return dense_to_moe(model, plan, **options)


def even(model: Any, *shares: float) -> dict[str, list[float]]:
    number = moe_layers(model)[0].num_experts
    return {layer.name: list(shares or [1 / number] * number) for layer in moe_layers(model)}


@pytest.mark.parametrize("method", ["merge", "drop"])
@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_copies_become_fewer_without_a_change(method: Any, router: str, number: int) -> None:
    model = student(method="full_copy", expert_size=32, num_shared=0, router=router)
    smaller, joined = compact_experts(model, number, use=even(model), method=method)
    batch = token_batch()
    torch.testing.assert_close(logits_of(smaller, batch), logits_of(model, batch))
    assert {layer.num_experts for layer in moe_layers(smaller)} == {number}
    assert all(sorted(sum(one.groups, ())) == [0, 1, 2, 3] for one in joined)
    assert count_parameters(smaller).total < count_parameters(model).total


def test_all_neurons_of_one_kept_expert_are_a_pruned_dense_student() -> None:
    """Experts whose neurons fit into one are joined without a loss: as the dense layer had them."""
    model = tiny_model("bert")
    plan = plan_partition(random_scores(model), num_experts=1, expert_size=14, num_shared_neurons=0)
    dense = dense_to_moe(model, plan)
    copies = student(num_shared=14)
    one, _ = compact_experts(copies, 1, use=even(copies))
    torch.testing.assert_close(logits_of(one, token_batch()), logits_of(dense, token_batch()))


def test_similarity_equals_the_loop_over_neurons() -> None:
    experts = moe_layers(student())[0].experts
    vectors = [
        [
            torch.cat([experts.w_in[e, n], experts.w_out[e, :, n], experts.b_in[e, n : n + 1]])
            for n in range(14)
        ]
        for e in range(4)
    ]

    def best(a: int, b: int) -> float:
        cosines = [
            max(float(torch.cosine_similarity(x, y, dim=0).detach()) for y in vectors[b])
            for x in vectors[a]
        ]
        return sum(cosines) / len(cosines)

    found = expert_similarity(experts)
    for a in range(4):
        for b in range(4):
            assert float(found[a, b]) == pytest.approx((best(a, b) + best(b, a)) / 2, abs=1e-5)


def test_what_is_rarely_used_or_alike_is_joined_first() -> None:
    similarity = torch.full((4, 4), 0.2).fill_diagonal_(1.0)
    similarity[1, 2] = similarity[2, 1] = 0.9
    even_use = torch.tensor([0.25, 0.25, 0.25, 0.25])
    assert group_experts(even_use, similarity, 3) == ((0,), (1, 2), (3,))
    rare = torch.tensor([0.4, 0.29, 0.3, 0.01])
    assert group_experts(rare, similarity, 3) in (
        ((0, 3), (1,), (2,)),
        ((0,), (1, 3), (2,)),
        ((0,), (1,), (2, 3)),
    )
    assert group_experts(rare, similarity, 2) == ((0, 3), (2, 1))


def test_a_dropped_experts_tokens_go_where_it_went() -> None:
    model = student(router="hash_random")
    use = even(model, 0.4, 0.3, 0.2, 0.1)
    smaller, joined = compact_experts(model, 2, use=use, method="drop")
    for old, new, one in zip(moe_layers(model), moe_layers(smaller), joined, strict=True):
        place = {expert: index for index, group in enumerate(one.groups) for expert in group}
        wanted = [place[int(expert)] for expert in old.router.table.reshape(-1)]
        assert new.router.table.reshape(-1).tolist() == wanted
        for index, group in enumerate(one.groups):
            assert group[0] == min(group), "shares fall with the number here"
            assert torch.equal(new.experts.w_in[index], old.experts.w_in[group[0]])
            assert torch.equal(new.experts.w_out[index], old.experts.w_out[group[0]])


def test_joined_experts_keep_alike_neurons_once_and_the_weightiest_of_the_rest() -> None:
    model = student()
    smaller, joined = compact_experts(model, 1, use=even(model))
    layer, kept = moe_layers(model)[0].experts, moe_layers(smaller)[0].experts
    # Eight shared ones start alike; of 4 * 6 private ones the six weightiest stay.
    private = layer.w_in[:, 8:].reshape(24, -1)
    norms = torch.cat([private, layer.b_in[:, 8:].reshape(24, 1)], dim=1).norm(dim=1)
    norms = 0.25 * norms * layer.w_out[:, :, 8:].transpose(1, 2).reshape(24, -1).norm(dim=1)
    best = private[norms.topk(6).indices]
    for row in [*layer.w_in[0, :8], *best]:
        assert float((kept.w_in[0] - row).abs().amax(dim=1).min().detach()) < 1e-6
    assert [sorted(group) for group in joined[0].groups] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
def test_neurons_that_are_alike_are_stored_once_without_a_change(
    router: str, tmp_path: Path
) -> None:
    model = student(router=router)
    batch = token_batch()
    with torch.no_grad():  # not in the same place in every expert
        for layer in moe_layers(model):
            order = torch.randperm(14)
            for name, axis in (("w_in", 0), ("b_in", 0), ("w_out", 1)):
                tensor = getattr(layer.experts, name)
                tensor[2] = tensor[2].index_select(axis, order)
    fused, count = fuse_neurons(model)
    assert count == 8
    torch.testing.assert_close(logits_of(fused, batch), logits_of(model, batch))
    neuron = 2 * 16 + 1
    saved = count_parameters(model).total - count_parameters(fused).total
    assert saved == 2 * 3 * 8 * neuron
    again = load_model(save_model(fused, tmp_path / "fused"))
    torch.testing.assert_close(logits_of(again, batch), logits_of(fused, batch))
    smaller, _ = compact_experts(fused, 2, use=even(fused))
    assert all(layer.shared is not None for layer in moe_layers(smaller))


def test_fusion_leaves_alone_what_it_may_not_touch() -> None:
    for options in ({"tie_shared": True}, {"num_shared": 0, "expert_size": 8}):
        model = student(**options)
        assert fuse_neurons(model) == (model, 0)
    scaled = student(router="token_gate", gate_scale="probability")
    assert fuse_neurons(scaled) == (scaled, 0)
    for router in ({"router": "hash_random"}, {"router": "task_gate", "task_map": "fixed"}):
        gateless = student(gate_scale="probability", num_tasks=1, **router)
        assert fuse_neurons(gateless)[1] == 8, "there is no probability to scale by"


def test_a_compacted_model_is_saved_and_read_like_any(tmp_path: Path) -> None:
    model = student(router="token_gate")
    smaller, _ = compact_experts(model, 2, use=even(model))
    again = load_model(save_model(smaller, tmp_path / "model"))
    batch = token_batch()
    torch.testing.assert_close(logits_of(again, batch), logits_of(smaller, batch))
    assert again.config.moe["num_experts"] == 2 and model.config.moe["num_experts"] == 4


def test_what_cannot_be_joined_is_named() -> None:
    model = student()
    for number in (0, 4, 9):
        with pytest.raises(ConversionError, match="not fewer"):
            compact_experts(model, number, use=even(model))
    two = student(top_k=2)
    with pytest.raises(ConversionError, match="uses 2 experts"):
        compact_experts(two, 1, use=even(two))
    with pytest.raises(ConversionError, match="no experts"):
        compact_experts(tiny_model("bert"), 1, use={})
