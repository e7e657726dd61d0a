"""A merge equals its per-token oracle, outputs and gradients, by every path."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe import (
    Experts,
    MergedLayer,
    MoELayer,
    Routing,
    RoutingContext,
    TokenGate,
    merge,
    merged_linear,
    record_routing,
    use_context,
)
from moe_dist.moe.merge import Merges, merge_experts
from moe_dist.moe.reference import reference_merge
from tests.moe.merged import (
    D_MODEL,
    EXPERT_SIZE,
    MERGED,
    NUM_EXPERTS,
    batch,
    gradients_of,
    merged_layer,
)


@pytest.fixture(params=["merges", "merges one by one", "applies"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one of the ways to compute a merge."""
    if request.param == "merges one by one":
        monkeypatch.setattr(merged_linear, "OWN_MERGE_COST", 0)
    cost = 1e9 if request.param == "applies" else -1e9
    monkeypatch.setattr(merge, "MERGE_COST", cost)
    return str(request.param)


def assert_equals_oracle(layer: MergedLayer, hidden: torch.Tensor, context: RoutingContext) -> None:
    fast = gradients_of(layer, layer, hidden, context)
    slow = gradients_of(layer, lambda value: reference_merge(layer, value), hidden, context)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "top_k", "gated", "biases", "num_shared"),
    [
        *itertools.product(MERGED, (1, 2, 6), (False, True), (True,), (0,)),
        ("merged_sequence", 2, True, False, 3),
        ("merged_token", 3, False, False, 3),
        ("merged_task", 2, False, True, 3),
    ],
)
def test_the_layer_equals_its_oracle(
    router: str, top_k: int, gated: bool, biases: bool, num_shared: int, path: str
) -> None:
    layer = merged_layer(router, top_k=top_k, gated=gated, biases=biases, num_shared=num_shared)
    assert_equals_oracle(layer, *batch())


def test_parts_and_chunks_of_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "MERGE_COST", -1e9)
    monkeypatch.setattr(merged_linear, "PART_BYTES", 3 * D_MODEL * 4 * 2)
    monkeypatch.setattr(merged_linear, "GROUPS_AT_ONCE", 2)
    layer = merged_layer(top_k=2)
    assert_equals_oracle(layer, *batch((4, 1, 4, 2, 3)))


@pytest.mark.parametrize("num_groups", [1, 5])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_are_those_of_finite_differences(num_groups: int, top_k: int, path: str) -> None:
    torch.manual_seed(0)
    experts = Experts(7, 3, 2, activation="tanh").double()
    group_T = torch.tensor([3, 0, 0, 4, 1, 3]) % num_groups
    ids = torch.stack([torch.randperm(7)[:top_k] for _ in range(num_groups)])
    names = [name for name, _ in experts.named_parameters()]

    def run(hidden: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        own = dict(zip(names, values[2:], strict=True))
        by_linear = {
            "in": Routing(ids, values[0]),
            "out": Routing(ids.flip(0), values[1]),
        }
        function = torch.func.functional_call
        return function(_Merging(experts, Merges(by_linear, group_T)), own, (hidden,))

    inputs = [torch.randn(6, 3), *(torch.rand(num_groups, top_k) for _ in range(2))]
    values = [value.double().requires_grad_() for value in (*inputs, *experts.parameters())]
    names = [f"experts.{name}" for name in names]
    assert gradcheck(run, values)


class _Merging(torch.nn.Module):
    def __init__(self, experts: Experts, merges: Merges) -> None:
        super().__init__()
        self.experts = experts
        self.merges = merges

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return merge_experts(self.experts, hidden, self.merges)


def test_copies_of_one_expert_keep_its_function(path: str) -> None:
    layer = merged_layer(top_k=3)
    for value in layer.experts.parameters():
        with torch.no_grad():
            value.copy_(value[:1].expand_as(value))
    hidden, context = batch()
    with torch.no_grad(), use_context(context):
        found = layer(hidden)
    alone = Experts(1, D_MODEL, EXPERT_SIZE, activation="gelu")
    state = {name: value[:1] for name, value in layer.experts.state_dict().items()}
    alone.load_state_dict(state)
    expected = alone(hidden.flatten(0, 1)).view(hidden.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_experts_without_neurons_give_their_merged_bias() -> None:
    layer = merged_layer(expert_size=0, num_shared=4)
    assert_equals_oracle(layer, *batch())


def test_a_batch_without_tokens_stays_empty(path: str) -> None:
    layer = merged_layer("merged_task")
    with use_context(RoutingContext(task_ids=torch.tensor([1]))):
        assert layer(torch.zeros(0, 4, D_MODEL)).shape == (0, 4, D_MODEL)


def test_half_precision(path: str) -> None:
    hidden, context = batch()
    with torch.no_grad(), use_context(context):
        expected = merged_layer()(hidden)
        found = merged_layer(dtype=torch.bfloat16)(hidden.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            cast = merged_layer()(hidden)
    assert found.dtype == cast.dtype == torch.bfloat16
    for one in (found, cast):
        assert float((one.float() - expected).abs().mean()) < 0.1 * float(expected.std())


@pytest.mark.parametrize("router", MERGED)
def test_weights_sum_to_one_in_half_precision(router: str, path: str) -> None:
    hidden, context = batch()
    for casts in (False, True):
        layer = merged_layer(router, top_k=3, dtype=torch.float32 if casts else torch.bfloat16)
        with torch.no_grad():
            # What is merged of outputs that are all 1 is 1, or else the weights' sum.
            for value in layer.experts.parameters():
                value.fill_(0.0)
            assert layer.experts.b_out is not None
            layer.experts.b_out.fill_(1.0)
        with (
            torch.no_grad(),
            use_context(context),
            record_routing() as record,
            torch.autocast("cpu", torch.bfloat16, enabled=casts),
        ):
            found = layer(hidden if casts else hidden.bfloat16())
        for entry in record.entries:
            weights = entry.routing.expert_weights
            assert weights.dtype == torch.float32
            torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))
        if casts and path != "applies":
            assert torch.equal(found, torch.ones_like(found))
        else:
            torch.testing.assert_close(found, torch.ones_like(found), rtol=2**-7, atol=0)


def test_gradients_in_half_precision(path: str) -> None:
    """Rows are padded to round numbers there, which must add nothing."""
    hidden, context = batch((5, 3, 4))
    whole, half = (
        gradients_of(layer, layer, hidden.to(dtype), context)
        for dtype in (torch.float32, torch.bfloat16)
        for layer in [merged_layer("merged_task", dtype=dtype)]
    )
    for one, other in zip(half, whole, strict=True):
        missed = float((one.float() - other).abs().mean())
        assert missed <= 0.1 * float(other.abs().mean()) + 1e-6


def test_sequences_that_merge_alike_share_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "MERGE_COST", -1e9)
    seen = []
    original = merged_linear._parts

    def count(weight: Any, ids: Any, weights: Any, sizes: list[int]) -> Any:
        seen.append(sum(size > 0 for size in sizes))
        return original(weight, ids, weights, sizes)

    monkeypatch.setattr(merged_linear, "_parts", count)
    hidden, context = batch((5, 5, 5))
    hidden[2] = hidden[0]
    layer = merged_layer()
    with torch.no_grad(), use_context(context):
        found = layer(hidden)
        expected = reference_merge(layer, hidden)
    assert seen == [2, 2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    seen.clear()
    with torch.no_grad(), use_context(context):
        merged_layer(drawn=False)(hidden)
    assert seen == [1, 1], "gates that start at zero merge all sequences alike"


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge.applying_is_cheaper(num_tokens=8, num_groups=8, top_k=8)
    assert not merge.applying_is_cheaper(num_tokens=1024, num_groups=8, top_k=8)
    assert merge.applying_is_cheaper(num_tokens=1024, num_groups=8, top_k=1)
    # Groups that use other experts each make a merge dearer, until each merges its own.
    assert not merge.applying_is_cheaper(128, 8, 2)
    assert merge.applying_is_cheaper(128, 8, 2, num_used=8)
    assert not merge.applying_is_cheaper(1024, 8, 2, num_used=10_000)
    monkeypatch.setattr(merge, "merged_linear", lambda *_: pytest.fail("merged"))
    hidden, context = batch((1, 1, 1))
    with torch.no_grad(), use_context(context):
        merged_layer(top_k=2)(hidden)


@pytest.mark.parametrize("top_k", [2, NUM_EXPERTS])
def test_no_weight_of_every_group_is_kept(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph holds between forward and backward does not grow with D x F x groups."""
    monkeypatch.setattr(merge, "MERGE_COST", -1e9)
    layer = merged_layer(top_k=top_k)
    sizes = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        sizes.append(value.numel())
        return value

    hidden, context = batch((4,) * 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), use_context(context):
        layer(hidden)
    assert max(sizes) <= hidden.numel() < 32 * D_MODEL * EXPERT_SIZE


def test_merged_weights_are_one_tasks_dense_network() -> None:
    layer = merged_layer("merged_task", gated=True, num_experts=4).train()
    hidden, _ = batch()
    for task in range(3):
        weights = layer.merged_weights(task)
        assert set(weights) == {name for name, _ in layer.experts.named_parameters()}
        alone = Experts(1, D_MODEL, EXPERT_SIZE, activation="gelu", gated=True)
        alone.load_state_dict({name: value.unsqueeze(0) for name, value in weights.items()})
        with torch.no_grad(), use_context(RoutingContext(task_ids=torch.tensor([task]))):
            expected = layer.eval()(hidden)
        torch.testing.assert_close(
            alone(hidden.flatten(0, 1)).view(hidden.shape), expected, rtol=1e-5, atol=1e-5
        )


def test_what_is_merged_for_each_sequence_has_no_dense_weights() -> None:
    layer = merged_layer()
    with pytest.raises(ConversionError, match="each sequence"):
        layer.merged_weights(0)


def test_a_gate_that_merges_and_a_layer_that_sends_do_not_go_together() -> None:
    layer = merged_layer()
    with pytest.raises(ValueError, match="MergedLayer"):
        MoELayer(layer.experts, layer.router)
    with pytest.raises(ValueError, match="MergedLayer"):
        MergedLayer(layer.experts, TokenGate(D_MODEL, NUM_EXPERTS))


@pytest.mark.parametrize("one_gate", [False, True])
def test_each_gate_is_recorded_by_group(one_gate: bool) -> None:
    layer = merged_layer(gated=True, merge_gates="one" if one_gate else "each")
    hidden, context = batch()
    assert context.mask is not None
    context.mask[1] = False
    with torch.no_grad(), use_context(context), record_routing() as record:
        layer(hidden)
    names = [entry.name for entry in record.entries]
    assert names == (["layer.ffn"] if one_gate else ["layer.in", "layer.gate", "layer.out"])
    for entry in record.entries:
        assert entry.num_experts == NUM_EXPERTS
        assert entry.routing.expert_ids.shape == (3, 2)
        assert entry.mask_T is not None
        assert entry.mask_T.tolist() == [True, False, True]


def test_sequences_whose_ends_are_not_known_are_refused() -> None:
    with pytest.raises(MissingInputError, match="merged_sequence must know where"):
        merged_layer()(torch.zeros(2, 3, D_MODEL))
    with pytest.raises(MissingInputError, match="merged_task knows 3 tasks"):
        merged_layer("merged_task")(torch.zeros(2, 3, D_MODEL))
