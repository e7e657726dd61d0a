"""Gates for kinds of tokens, and the neurons of each kind counted token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import dense_to_moe, plan_partition, score_importance
from moe_dist.conversion.families import find_slots
from moe_dist.conversion.importance import accepted_inputs, task_losses
from moe_dist.conversion.token_clusters import WHOLE_SHARE, _fit_gate, token_clusters
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.layer import MoELayer
from tests.conversion.dense_models import FAMILY_NAMES, random_scores, tiny_model
from tests.conversion.test_activity import labelled_batches


def test_a_gate_tells_kinds_apart_without_a_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator) * 3 + 5
    kind_T = torch.arange(300) % 3
    rows_TD = centres[kind_T] + torch.randn(300, 16, generator=generator) / 4
    chosen_T = (rows_TD @ _fit_gate(rows_TD, 3, seed=0).T).argmax(dim=-1)
    for kind in range(3):
        assert len(chosen_T[kind_T == kind].unique()) == 1
    assert len(chosen_T.unique()) == 3


def test_two_kinds_and_tokens_that_are_all_alike() -> None:
    rows_TD = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).repeat(20, 1)
    chosen_T = (rows_TD @ _fit_gate(rows_TD, 2, seed=0).T).argmax(dim=-1)
    assert chosen_T[:2].unique().numel() == 2
    assert torch.equal(_fit_gate(torch.ones(9, 4), 2, seed=0), torch.zeros(2, 4))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_scores_are_those_of_single_tokens(family: str) -> None:
    model = tiny_model(family)
    batches = labelled_batches(model)
    found = token_clusters(model, [batches], 2, seed=0)
    slots = find_slots(model)
    index = 0  # every token has a gradient there
    slot = slots[index]
    total_EF = torch.zeros(2, slot.num_neurons)
    for batch in batches:
        seen: dict[str, Tensor] = {}

        def before(_: Any, args: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = args[0].detach()

        def active(_: Any, args: Any, seen: dict[str, Tensor] = seen) -> None:
            args[0].retain_grad()
            seen["a"] = args[0]

        def linear(_: Any, __: Any, out: Tensor, seen: dict[str, Tensor] = seen) -> None:
            out.retain_grad()
            seen.setdefault("z", out)

        def gate(_: Any, __: Any, out: Tensor, seen: dict[str, Tensor] = seen) -> None:
            out.retain_grad()
            seen["g"] = out

        handles = [
            slot.linear_in.register_forward_pre_hook(before),
            slot.linear_in.register_forward_hook(linear),
            slot.linear_out.register_forward_pre_hook(active),
        ]
        if slot.gate is not None:
            handles.append(slot.gate.register_forward_hook(gate))
        outputs = model(**accepted_inputs(model, batch))
        task_losses(model, outputs, batch).sum().backward()
        for handle in handles:
            handle.remove()
        biases = {"z": slot.linear_in.bias, "a": None, "g": getattr(slot.gate, "bias", None)}
        size = torch.zeros(())
        for name, bias in biases.items():
            if name in seen:
                value = seen[name].detach() - (0 if bias is None else bias.detach())
                product: Tensor = seen[name].grad * value  # type: ignore[operator]
                # A fused layer gives two outputs for each neuron.
                size = size + product.unflatten(-1, (-1, slot.num_neurons)).sum(dim=-2)
        size = size.abs()
        for row, of_token in zip(seen["x"].flatten(0, 1), size.flatten(0, 1), strict=True):
            total_EF[int((found.gates[index] @ row).argmax())] += of_token
    total_EF = total_EF / total_EF.sum()
    own_EF = total_EF / total_EF.sum(dim=1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(
        found.scores[index], own_EF + WHOLE_SHARE * total_EF.sum(0), rtol=1e-3, atol=1e-6
    )


def test_the_last_layer_of_a_classifier_ranks_its_neurons_for_every_kind() -> None:
    model = tiny_model("bert")
    scores = token_clusters(model, [labelled_batches(model)], 2, seed=0).scores[-1]
    assert bool((scores > 0).all()), "a kind without gradient falls back on all tokens"


def test_it_repeats_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("bert").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (token_clusters(model, [labelled_batches(model)], 2, seed=4) for _ in "12")
    for one, other in zip(first.gates + first.scores, second.gates + second.scores, strict=True):
        assert torch.equal(one, other)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_student_routes_by_the_gates_it_is_given() -> None:
    model = tiny_model("bert")
    batches = labelled_batches(model)
    found = token_clusters(model, [batches], 2, seed=0)
    plan = plan_partition(
        score_importance(model, batches),
        num_experts=2,
        expert_size=8,
        num_shared_neurons=2,
        method="token_clusters",
        expert_scores=list(found.scores),
    )
    student = dense_to_moe(model, plan, router="token_gate", gates=found.gates)
    layers = [layer for layer in student.modules() if isinstance(layer, MoELayer)]
    for layer, gate_ED, scores_EF, part in zip(
        layers, found.gates, found.scores, plan.partitions, strict=True
    ):
        router: Any = layer.router
        assert torch.equal(router.gate.weight, gate_ED)
        for expert in range(2):
            own = part.expert_ids[expert, 2:]
            rest = [n for n in range(len(scores_EF[expert])) if n not in part.shared_ids.tolist()]
            best = sorted(rest, key=lambda n: -float(scores_EF[expert, n]))[:6]
            assert own.tolist() == best
    for router in ("hash_random", "sentence_gate"):
        with pytest.raises(ConversionError, match="take the router token_gate"):
            dense_to_moe(model, plan, router=router, gates=found.gates)
    with pytest.raises(ConversionError, match="1 gates"):
        dense_to_moe(model, plan, router="token_gate", gates=found.gates[:1])


def test_what_is_missing_is_named() -> None:
    model = tiny_model("bert")
    with pytest.raises(MissingInputError, match="do not make 3 clusters"):
        token_clusters(model, [[]], 3, seed=0)
    with pytest.raises(MissingInputError, match=r"token_clusters\.token_clusters"):
        plan_partition(
            random_scores(model),
            num_experts=2,
            expert_size=8,
            num_shared_neurons=2,
            method="token_clusters",
        )


def test_chunks_and_infinities_are_refused() -> None:
    chunked = tiny_model("bert", chunk_size_feed_forward=2)
    with pytest.raises(ConversionError, match="chunk_size_feed_forward=0"):
        token_clusters(chunked, [labelled_batches(chunked)], 2, seed=0)
    model = tiny_model("bert")
    with torch.no_grad():
        find_slots(model)[0].weights().w_out[0, 0] = float("nan")
    with pytest.raises(ConversionError, match="not all finite"):
        token_clusters(model, [labelled_batches(model)], 2, seed=0)
