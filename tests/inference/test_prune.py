"""Smaller experts: what is kept is what matters, and nothing else changes."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.errors import ConversionError
from moe_dist.inference import load_model, save_model
from moe_dist.inference.prune import prune_experts
from moe_dist.measure.profile import count_parameters
from moe_dist.moe.layer import moe_layers
from tests.conversion.dense_models import logits_of, random_scores, tiny_model, token_batch
from tests.moe.merged import MERGED, draw_gates


def student(family: str = "bert", *, tied: int = 0, number: int = 3, **options: Any) -> Any:
    model = tiny_model(family)
    plan = plan_partition(
        random_scores(model),
        num_experts=number,
        expert_size=10,
        num_shared_neurons=tied or options.pop("shared", 0),
        tie_shared=tied > 0,
    )
    routed = {"router": "token_gate"} if number > 1 else {}
    return dense_to_moe(model, plan, **(routed | options))


def drawn_scores(model: Any) -> list[Tensor]:
    """Random importance of every neuron."""
    generator = torch.Generator().manual_seed(3)
    sizes = []
    for layer in moe_layers(model):
        shared = layer.shared.expert_size if layer.shared else 0
        sizes.append(shared + layer.experts.num_experts * layer.experts.expert_size)
    return [torch.rand(size, generator=generator) for size in sizes]


def silence(model: Any, scores: list[Tensor], keep: int) -> None:
    """Give each expert and the shared neurons `keep` neurons that speak, and score only these."""
    for layer, score_N in zip(moe_layers(model), scores, strict=True):
        start = 0
        for experts in (layer.shared, layer.experts):
            if experts is None:
                continue
            for expert in range(experts.num_experts):
                size = experts.expert_size
                part = score_N[start : start + size]
                dumb = part.argsort()[: max(size - keep, 0)]
                part[dumb] = 0
                with torch.no_grad():
                    experts.w_out[expert][:, dumb] = 0
                start += size


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5-gated", "bart"])
@pytest.mark.parametrize(("tied", "number"), [(0, 3), (4, 3), (0, 1)])
def test_neurons_that_say_nothing_go_without_a_change(family: str, tied: int, number: int) -> None:
    model = student(family, tied=tied, number=number)
    scores = [score_N + 0.5 for score_N in drawn_scores(model)]
    silence(model, scores, keep=3)
    size = 6 if tied else 3
    smaller, kept = prune_experts(model, size, scores)
    batch = token_batch()
    torch.testing.assert_close(logits_of(smaller, batch), logits_of(model, batch))
    assert all(one.kept_importance == pytest.approx(1.0) for one in kept)
    assert count_parameters(smaller).total < count_parameters(model).total
    for layer in moe_layers(smaller):
        shared = layer.shared.expert_size if layer.shared else 0
        assert layer.experts.expert_size + shared == size


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9])
def test_the_number_of_shared_neurons_is_the_best_of_all(size: int) -> None:
    model = student(tied=4)
    scores = drawn_scores(model)
    best = 0.0
    for shared, own in product(range(5), range(1, 7)):
        if shared + own == size:
            total = 0.0
            for score_N in scores:
                rows = score_N[4:].view(3, 6).sort(descending=True).values
                kept = score_N[:4].sort(descending=True).values[:shared].sum()
                total += float((kept + rows[:, :own].sum()) / score_N.sum())
            best = max(best, total)
    _, found = prune_experts(model, size, scores)
    assert sum(one.kept_importance for one in found) == pytest.approx(best)
    assert len({len(one.shared_ids) for one in found}) == 1


def test_kept_neurons_are_copies_and_the_router_stays() -> None:
    model = student(tied=4)
    smaller, kept = prune_experts(model, 5, drawn_scores(model))
    for old, new, one in zip(moe_layers(model), moe_layers(smaller), kept, strict=True):
        assert torch.equal(old.router.state_dict()["gate.weight"], new.router.gate.weight)
        for expert, ids in enumerate(one.own_ids):
            where = list(ids)
            assert torch.equal(old.experts.w_in[expert][where], new.experts.w_in[expert])
            assert torch.equal(old.experts.b_in[expert][where], new.experts.b_in[expert])
            assert torch.equal(old.experts.w_out[expert][:, where], new.experts.w_out[expert])
        assert torch.equal(old.experts.b_out, new.experts.b_out)
        if new.shared is not None:
            assert torch.equal(old.shared.w_in[0][list(one.shared_ids)], new.shared.w_in[0])


def test_kept_neurons_are_named_in_order_and_the_settings_are_true() -> None:
    model = student(shared=4)
    smaller, kept = prune_experts(model, 5, drawn_scores(model))
    for one in kept:
        for ids in one.own_ids:
            assert list(ids) == sorted(ids)
    # Each expert chose for itself, so that no neuron is any longer known to be shared.
    assert smaller.config.moe["num_shared_neurons"] == 0
    assert smaller.config.moe["tie_shared"] is False
    assert smaller.config.moe["expert_size"] == 5


def test_experts_without_a_score_keep_the_neurons_of_the_largest_weights() -> None:
    model = student()
    scores = drawn_scores(model)
    last = moe_layers(model)[-1]
    scores[-1][10:20] = 0
    with torch.no_grad():
        for neuron in (2, 7, 9):
            last.experts.w_in[1, neuron] *= 50
    _, kept = prune_experts(model, 3, scores)
    assert kept[-1].own_ids[1] == (2, 7, 9)
    assert kept[-1].unscored_experts == (1,) and kept[0].unscored_experts == ()


def test_a_tied_student_keeps_a_neuron_of_each_expert() -> None:
    model = student(tied=4)
    scores = drawn_scores(model)
    for score_N in scores:
        score_N[4:] *= 1e-6
    smaller, _ = prune_experts(model, 3, scores)
    assert {layer.experts.expert_size for layer in moe_layers(smaller)} == {1}


def test_what_is_no_expert_stays_as_it_was() -> None:
    model = student("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    model.generation_config.max_length = 77
    smaller, _ = prune_experts(model, 5, drawn_scores(model))
    assert smaller.generation_config.max_length == 77
    assert not smaller.transformer.wte.weight.requires_grad
    assert all(parameter.requires_grad for parameter in moe_layers(smaller)[0].parameters())


def test_a_pruned_student_is_saved_and_loaded(tmp_path: Path) -> None:
    for tied in (0, 4):
        smaller, _ = prune_experts(model := student(tied=tied), 2, drawn_scores(model))
        save_model(smaller, tmp_path / str(tied))
        again = load_model(tmp_path / str(tied))
        assert torch.equal(logits_of(again, token_batch()), logits_of(smaller, token_batch()))


def test_what_cannot_be_pruned_is_refused() -> None:
    model = student(tied=4)
    scores = drawn_scores(model)
    for size in (0, 10, 11):
        with pytest.raises(ConversionError, match="use 1 to 9"):
            prune_experts(model, size, scores)
    with pytest.raises(ConversionError, match="2 layers have experts, but 1"):
        prune_experts(model, 5, scores[:1])
    with pytest.raises(ConversionError, match="22 neurons"):
        prune_experts(model, 5, [score_N[1:] for score_N in scores])
    with pytest.raises(ConversionError, match="no experts"):
        prune_experts(tiny_model("bert"), 5, scores)


@pytest.mark.parametrize("router", MERGED)
@pytest.mark.parametrize("tied", [0, 4])
def test_merged_experts_keep_neurons_of_the_same_places(router: str, tied: int) -> None:
    model = student(tied=tied, router=router, top_k=2)
    draw_gates(model)
    scores = drawn_scores(model)
    for layer, score_N in zip(moe_layers(model), scores, strict=True):
        size = layer.experts.expert_size
        by_place = score_N[layer.num_shared_neurons :].view(3, size)
        dumb = by_place.sum(dim=0).argsort()[: size - 3]
        by_place[:, dumb] = 0
        with torch.no_grad():
            layer.experts.w_out[:, :, dumb] = 0
    smaller, kept = prune_experts(model, 3 + tied, scores)
    batch = token_batch()
    torch.testing.assert_close(
        logits_of(smaller, batch), logits_of(model, batch), rtol=1e-4, atol=1e-5
    )
    for one in kept:
        assert len(set(one.own_ids)) == 1
        assert len(one.own_ids) == 3
        assert one.kept_importance == pytest.approx(1)
        assert one.unscored_experts == ()
