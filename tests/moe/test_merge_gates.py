"""Merge gates read what they say, and nothing else of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.errors import ConversionError
from moe_dist.moe import MergedLayer, RoutingContext, use_context
from moe_dist.moe.merge_gates import NoisyTopK
from tests.moe.merged import D_MODEL, MERGED, NUM_EXPERTS, batch, merged_layer


def output(layer: MergedLayer, hidden: Tensor, context: RoutingContext) -> Tensor:
    with torch.no_grad(), use_context(context):
        found: Tensor = layer(hidden)
    return found


def test_equal_scores_take_the_first_experts_with_equal_weights() -> None:
    gate = NoisyTopK(D_MODEL, NUM_EXPERTS, top_k=4, seed=0).eval()
    routing = gate(torch.randn(3, D_MODEL), None)
    assert routing.expert_ids.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(routing.expert_weights, torch.full((3, 4), 0.25))
    assert routing.noise_std is None


def test_noise_is_scaled_by_what_its_weights_say() -> None:
    gate = NoisyTopK(D_MODEL, NUM_EXPERTS, top_k=2, seed=0)
    torch.nn.init.normal_(gate.gate.weight)
    torch.nn.init.normal_(gate.noise.weight)
    input_GD = torch.randn(3, D_MODEL)
    context = RoutingContext(sample_ids=torch.tensor([4, 9, 2]), noise_seed=1)
    routing = gate(input_GD, context)
    assert routing.clean_logits is not None
    assert routing.noise_std is not None
    assert routing.logits is not None
    torch.testing.assert_close(routing.clean_logits, input_GD @ gate.gate.weight.t())
    expected = torch.nn.functional.softplus(input_GD @ gate.noise.weight.t()) + 1e-2
    torch.testing.assert_close(routing.noise_std, expected)
    drawn = (routing.logits - routing.clean_logits) / routing.noise_std
    assert 0.3 < float(drawn.detach().std()) < 2
    top = routing.logits.topk(2)
    assert torch.equal(routing.expert_ids, top.indices)
    torch.testing.assert_close(routing.expert_weights, top.values.softmax(dim=-1))


def test_gates_of_one_layer_draw_apart() -> None:
    layer = merged_layer(drawn=False).train()
    hidden, context = batch()
    assert layer.router is not None
    merges = layer.router(hidden.flatten(0, 1), replace(context, noise_seed=7))
    one, other = (merges.by_linear[name].logits for name in ("in", "out"))
    assert not torch.allclose(one, other)
    alike = merged_layer(drawn=False, merge_gates="one").train()
    assert alike.router is not None
    merges = alike.router(hidden.flatten(0, 1), replace(context, noise_seed=7))
    assert torch.equal(merges.by_linear["in"].logits, merges.by_linear["out"].logits)


@pytest.mark.parametrize("router", MERGED)
@pytest.mark.parametrize("training", [False, True])
def test_a_sequence_does_not_depend_on_the_rest_of_its_batch(router: str, training: bool) -> None:
    layer = merged_layer(router).train(training)
    hidden, context = batch((5, 3, 4))
    context = replace(context, sample_ids=torch.tensor([8, 3, 5]), noise_seed=11)
    whole = output(layer, hidden, context)
    for index, length in enumerate((5, 3, 4)):
        assert context.mask is not None
        assert context.task_ids is not None
        assert context.sample_ids is not None
        own = slice(index, index + 1)
        alone = RoutingContext(
            mask=context.mask[own, :length],
            task_ids=context.task_ids[own],
            sample_ids=context.sample_ids[own],
            noise_seed=11,
        )
        found = output(layer, hidden[own, :length], alone)
        torch.testing.assert_close(found, whole[own, :length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", MERGED)
def test_padding_counts_nowhere(router: str) -> None:
    layer = merged_layer(router)
    hidden, context = batch((5, 3, 4))
    assert context.mask is not None
    changed = torch.where(context.mask.unsqueeze(-1), hidden, 100.0)
    real = context.mask
    torch.testing.assert_close(
        output(layer, hidden, context)[real], output(layer, changed, context)[real]
    )
    left, left_context = batch((5, 3, 4), left=True)
    for index, length in enumerate((5, 3, 4)):
        left[index, 5 - length :] = hidden[index, :length]
    assert left_context.mask is not None
    torch.testing.assert_close(
        output(layer, left, left_context)[left_context.mask],
        output(layer, hidden, context)[real],
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_sequence_gate_reads_the_mean_of_its_tokens() -> None:
    layer = merged_layer()
    hidden, context = batch((5, 3))
    router = layer.router
    assert router is not None
    merges = router(hidden.flatten(0, 1), context)
    for index, length in enumerate((5, 3)):
        expected = hidden[index, :length].mean(dim=0) @ router.gates["in"].gate.weight.t()
        torch.testing.assert_close(merges.by_linear["in"].logits[index], expected)


def test_a_task_gate_is_constant_without_training() -> None:
    layer = merged_layer("merged_task")
    assert layer.router is not None
    hidden, _ = batch((5, 5, 5, 5))
    context = RoutingContext(task_ids=torch.tensor([2, 0, 2, 1]))
    one, other = (layer.router(value.flatten(0, 1), context) for value in (hidden, -hidden))
    assert torch.equal(one.by_linear["in"].expert_ids, other.by_linear["in"].expert_ids)
    assert one.by_linear["in"].expert_ids.shape == (3, 2)
    assert one.group_T.view(4, 5)[:, 0].tolist() == [2, 0, 2, 1]


def test_a_tasks_samples_share_their_noise() -> None:
    layer = merged_layer("merged_task").train()
    assert layer.router is not None
    hidden, _ = batch((5, 5, 5, 5))
    context = RoutingContext(
        task_ids=torch.tensor([2, 0, 2, 1]), sample_ids=torch.arange(4), noise_seed=5
    )
    whole = layer.router(hidden.flatten(0, 1), context).by_linear["in"].logits
    alone = RoutingContext(task_ids=torch.tensor([2]), sample_ids=torch.tensor([77]), noise_seed=5)
    own = layer.router(hidden[:1].flatten(0, 1), alone).by_linear["in"].logits
    torch.testing.assert_close(own[0], whole[2])


def test_the_token_block_starts_as_the_identity() -> None:
    hidden, context = batch()
    fresh = merged_layer("merged_token", drawn=False)
    plain = merged_layer("merged_sequence", drawn=False)
    plain.experts.load_state_dict(fresh.experts.state_dict())
    assert torch.equal(output(fresh, hidden, context), output(plain, hidden, context))
    assert fresh.router is not None
    torch.nn.init.ones_(fresh.router.up.bias)
    found = output(fresh, hidden, context)
    assert not torch.allclose(found, output(plain, hidden, context), atol=1e-2)


def test_a_capacity_has_nothing_to_limit() -> None:
    with pytest.raises(ConversionError, match="no tokens travel"):
        merged_layer(capacity_factor=1.5)


def test_gates_learn_from_their_start() -> None:
    for router in MERGED:
        layer = merged_layer(router, drawn=False).train()
        hidden, context = batch()
        with use_context(replace(context, noise_seed=3)):
            layer(hidden).square().sum().backward()
        assert layer.router is not None
        for gate in layer.router.gates.values():
            for weight in (gate.gate.weight, gate.noise.weight):
                assert weight.grad is not None
                assert float(weight.grad.abs().sum()) > 0
