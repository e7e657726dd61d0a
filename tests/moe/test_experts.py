"""Stacked experts: the names that checkpoints hold, and both ways to compute a group."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.moe import Experts, MoELayer, RoutingContext, build_router, experts, use_context
from moe_dist.moe.reference import reference_expert, reference_layer


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias_in", [False, True])
@pytest.mark.parametrize("bias_out", [False, True])
def test_names_and_shapes_are_canonical(gated: bool, bias_in: bool, bias_out: bool) -> None:
    module = Experts(3, 4, 5, activation="relu", gated=gated, bias_in=bias_in, bias_out=bias_out)
    want: dict[str, tuple[int, ...]] = {"w_in": (3, 5, 4), "w_out": (3, 4, 5)}
    if bias_in:
        want["b_in"] = (3, 5)
    if gated:
        want["w_gate"] = (3, 5, 4)
    if gated and bias_in:
        want["b_gate"] = (3, 5)
    if bias_out:
        want["b_out"] = (3, 4)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == want


def test_experts_start_different_from_each_other() -> None:
    module = Experts(3, 4, 5, activation="relu")
    assert module.w_in is not None
    assert module.w_in.abs().max() <= 0.5
    assert not torch.equal(module.w_in[0], module.w_in[1])


@pytest.mark.parametrize("activation", ["gelu", nn.GELU(), torch.nn.functional.gelu])
def test_an_activation_is_a_name_a_module_or_a_function(activation: object) -> None:
    module = Experts(2, 4, 5, activation=activation)
    rows_TD, counts_E = torch.randn(3, 4), torch.tensor([1, 2])
    out = module(rows_TD, counts_E)
    want = [reference_expert(module, rows_TD[i], e) for i, e in enumerate((0, 1, 1))]
    torch.testing.assert_close(out, torch.stack(want))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(rows_TD, counts_E), out)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="'swoosh' is not one of gelu"):
        Experts(2, 4, 5, activation="swoosh")


def test_several_experts_need_counts() -> None:
    with pytest.raises(ValueError, match="tokens_per_expert"):
        Experts(2, 4, 5, activation="relu")(torch.zeros(3, 4))


def test_counts_that_do_not_cover_the_rows() -> None:
    with pytest.raises(AssertionError, match="does not sum"):
        Experts(2, 4, 5, activation="relu")(torch.zeros(3, 4), torch.tensor([1, 1]))


@pytest.mark.parametrize("counts", [[4, 3, 5], [0, 12, 0], [12, 0, 0], [0, 0, 12]])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_grouped_mm_equals_the_loop(
    counts: list[int],
    gated: bool,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    module = Experts(3, 16, 24, activation="gelu", gated=gated).to(dtype)
    results: list[list[Tensor]] = []
    for on_device in (False, True):
        monkeypatch.setattr(experts, "can_use_grouped_mm", lambda *_, now=on_device: now)
        rows_TD = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        rows_TD.requires_grad_()
        out = module(rows_TD, torch.tensor(counts))
        grads = torch.autograd.grad(out.sum(), [rows_TD, *module.parameters()])
        results.append([out, *grads])
    for looped, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2])
def test_layer_on_an_accelerator_equals_the_oracle(dtype: torch.dtype, top_k: int) -> None:
    torch.manual_seed(0)
    router = build_router("hash_random", d_model=64, num_experts=4, top_k=top_k, vocab_size=50)
    layer = MoELayer(Experts(4, 64, 32, activation="gelu"), router).to("cuda", dtype)
    hidden = torch.randn(3, 5, 64, device="cuda", dtype=dtype)
    with use_context(RoutingContext(torch.randint(50, (3, 5), device="cuda"))):
        fast, slow = layer(hidden), reference_layer(layer, hidden)
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=tolerance)
    parameters = list(layer.parameters())
    for got, want in zip(
        torch.autograd.grad(fast.float().square().sum(), parameters),
        torch.autograd.grad(slow.float().square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("top_k", [1, 3])
def test_flops_are_those_of_the_chosen_experts_only(top_k: int) -> None:
    num_tokens, d_model, expert_size = 40, 8, 6
    router = build_router("hash_random", d_model=8, num_experts=4, top_k=top_k, vocab_size=50)
    layer = MoELayer(Experts(4, d_model, expert_size, activation="gelu"), router)
    with (
        torch.no_grad(),
        use_context(RoutingContext(torch.randint(50, (num_tokens,)))),
        FlopCounterMode(display=False) as counter,
    ):
        layer(torch.randn(num_tokens, d_model))
    assert counter.get_total_flops() == 2 * 2 * num_tokens * top_k * d_model * expert_size


def test_gradient_memory_does_not_grow_with_the_square_of_experts() -> None:
    num_experts = 32
    module = Experts(num_experts, 32, 16, activation="gelu")
    parameter_bytes = sum(value.numel() * 4 for value in module.parameters())
    counts_E = torch.full((num_experts,), 2)
    rows_TD = torch.randn(2 * num_experts, 32)
    with torch.profiler.profile(profile_memory=True) as profile:
        module(rows_TD, counts_E).sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    # One gradient for each parameter and the activations; a loop over W[e] takes 32 times as much.
    assert parameter_bytes <= allocated < 3 * parameter_bytes
