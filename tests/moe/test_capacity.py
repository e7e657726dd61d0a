"""Full experts turn tokens away as the slow oracle says, and nothing is lost besides."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_dist.errors import ConversionError
from moe_dist.moe import Capacity, Routing, RoutingContext, record_routing, use_context
from moe_dist.moe.capacity import DROP_POLICIES
from moe_dist.moe.reference import reference_capacity
from tests.moe.test_layer import VOCAB_SIZE, assert_equals_oracle, batch, build_layer

NUM_EXPERTS = 3


def routing(num_tokens: int, top_k: int, *, gated: bool, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, NUM_EXPERTS, generator=generator) + torch.tensor([2, 0, 0])
    ids_TK = logits_TE.topk(top_k).indices
    weights_TK = torch.full((num_tokens, top_k), 1 / top_k)
    return Routing(ids_TK, weights_TK, logits_TE if gated else None, unit_weights=top_k == 1)


@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "factor", "padded", "gated"),
    list(itertools.product((1, 11), (1, 2), (0.1, 1.0, 1.25, 9.0), (False, True), (False, True))),
)
def test_who_is_kept_equals_the_oracle(
    num_tokens: int, top_k: int, factor: float, padded: bool, gated: bool, policy: str
) -> None:
    chosen = routing(num_tokens, top_k, gated=gated)
    mask_T = torch.rand(num_tokens) < 0.7 if padded else None
    capacity = Capacity(factor, policy)
    fast = capacity.apply(chosen, NUM_EXPERTS, mask_T)
    slow = reference_capacity(capacity, chosen, NUM_EXPERTS, mask_T)
    assert fast.kept is not None and slow.kept is not None
    assert torch.equal(fast.kept, slow.kept)
    torch.testing.assert_close(fast.expert_weights, slow.expert_weights)
    assert not fast.unit_weights
    assert fast.kept.any() == (mask_T is None or bool(mask_T.any()))


def test_by_position_the_first_tokens_stay() -> None:
    crowd = Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    kept = Capacity(1.0).apply(crowd, 2, None).kept
    assert kept is not None
    assert kept[:, 0].tolist() == [True, True, False, False]


def test_by_probability_the_surest_tokens_stay() -> None:
    logits = torch.tensor([[0.1, 0.0], [3.0, 0.0], [0.2, 0.0], [2.0, 0.0]])
    crowd = Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), logits)
    kept = Capacity(1.0, "probability").apply(crowd, 2, None).kept
    assert kept is not None
    assert kept[:, 0].tolist() == [False, True, False, True]


def test_enough_room_changes_nothing() -> None:
    chosen = routing(11, 2, gated=True)
    roomy = Capacity(float(NUM_EXPERTS)).apply(chosen, NUM_EXPERTS, None)
    assert roomy.kept is not None and bool(roomy.kept.all())
    assert torch.equal(roomy.expert_weights, chosen.expert_weights)


@pytest.mark.parametrize("router", ["hash_random", "token_gate", "sentence_gate"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_layer_equals_its_oracle(router: str, top_k: int, policy: str, padded: bool) -> None:
    layer = build_layer(router, top_k=top_k, num_shared=2)
    layer.capacity = Capacity(0.6, policy)
    hidden, context = batch(4, 6)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1]).unsqueeze(1)
    context = RoutingContext(context.token_ids, mask if padded else None)
    with use_context(context), record_routing() as record:
        layer(hidden)
    kept = record.entries[0].routing.kept
    assert kept is not None
    assert 0 < int(kept[mask.reshape(-1) if padded else slice(None)].sum()) < kept.numel()
    assert_equals_oracle(layer, hidden, context)


def test_a_batch_of_padding_only() -> None:
    layer = build_layer(num_shared=2)
    layer.capacity = Capacity(1.0)
    hidden, context = batch()
    empty = RoutingContext(context.token_ids, torch.zeros(3, 5, dtype=torch.bool))
    with use_context(empty):
        out = layer(hidden)
    out.sum().backward()
    assert out.isfinite().all()


def test_without_training_nothing_is_dropped() -> None:
    layer = build_layer("hash_random")
    hidden, context = batch()
    with use_context(context):
        expected = layer(hidden)
        layer.capacity = Capacity(0.1)
        assert not torch.allclose(layer(hidden), expected)
        assert torch.equal(layer.eval()(hidden), expected)
    assert int(context.token_ids.max()) < VOCAB_SIZE


@pytest.mark.parametrize(("factor", "policy"), [(0.0, "position"), (1.0, "luck")])
def test_faults_are_named(factor: float, policy: str) -> None:
    with pytest.raises(ConversionError, match="is no capacity"):
        Capacity(factor, policy)
