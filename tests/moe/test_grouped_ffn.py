"""Whole feed-forward networks, expert after expert, give what linear layers over all rows give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_dist.moe import experts as experts_module
from moe_dist.moe.experts import Experts

SIZES = [17, 0, 130, 1, 36]
WIDTH, NEURONS = 24, 40


def make(*, gated: bool = False, bias: bool = True, dtype: torch.dtype = torch.float32) -> Experts:
    torch.manual_seed(0)
    return Experts(
        len(SIZES),
        WIDTH,
        NEURONS,
        activation="silu" if gated else "gelu",
        gated=gated,
        bias_in=bias,
        bias_out=bias,
    ).to(dtype)


def rows_of(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SIZES), WIDTH, generator=generator).to(dtype)


@pytest.fixture
def over_all_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Choose the oracle: linear layers over the rows of all experts, one after the other."""
    real = experts_module.can_use_grouped_ffn

    def choose(is_oracle: bool) -> None:
        own = (lambda *_: False) if is_oracle else real
        monkeypatch.setattr(experts_module, "can_use_grouped_ffn", own)

    return choose


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("stored", "dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 3e-2),
        (torch.float32, torch.bfloat16, 3e-2),
    ],
)
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_outputs_and_gradients_are_those_of_linear_layers(
    over_all_rows: Callable[[bool], None],
    gated: bool,
    bias: bool,
    stored: torch.dtype,
    dtype: torch.dtype,
    tolerance: float,
    num_chunks: int,
) -> None:
    results = []
    for is_oracle in (False, True):
        over_all_rows(is_oracle)
        experts, rows = make(gated=gated, bias=bias, dtype=stored), rows_of(dtype).requires_grad_()
        part = experts.in_chunks(dtype, num_chunks)
        counts = torch.tensor(SIZES)
        # A second part of the same weights has no rows of the third expert.
        fewer = torch.tensor([17, 0, 0, 0, 0])
        out = part(rows, counts)
        if num_chunks == 2:
            out = torch.cat([out, part(rows[:17], fewer)])
        slope = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        out.backward(slope)
        grads = {name: one.grad for name, one in experts.named_parameters()} | {"rows": rows.grad}
        assert out.dtype is dtype
        for name, parameter in experts.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype is stored, name
        results.append({"out": out.detach()} | grads)
    fast, oracle = results
    assert fast.keys() == oracle.keys()
    for name, expected in oracle.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(fast[name], expected, atol=tolerance * scale, rtol=tolerance)
    assert not fast["w_in"][1].any()


def test_only_what_learns_has_a_gradient() -> None:
    experts, rows = make(gated=True), rows_of(torch.float32)
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name in ("w_gate", "b_out"))
    experts(rows, torch.tensor(SIZES)).sum().backward()
    learned = {name for name, one in experts.named_parameters() if one.grad is not None}
    assert learned == {"w_gate", "b_out"}
    torch.testing.assert_close(
        experts.b_out.grad, torch.tensor(SIZES).float()[:, None].expand(-1, WIDTH)
    )


def test_without_rows_there_is_an_output_and_a_gradient() -> None:
    experts, rows = make(), torch.zeros(0, WIDTH, requires_grad=True)
    out = experts(rows, torch.zeros(len(SIZES), dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, WIDTH)
    assert experts.w_in.grad is not None and not experts.w_in.grad.any()


def test_a_graph_may_be_differentiated_again() -> None:
    experts, rows = make(gated=True), rows_of(torch.float32).requires_grad_()
    total = experts(rows, torch.tensor(SIZES)).square().sum()
    leaves = [rows, *experts.parameters()]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_activations_are_not_kept() -> None:
    """Of a gated network two tensors of all neurons and not five."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape[-1] == NEURONS and tensor.dim() == 2 and tensor.shape[0] > len(SIZES):
            sizes.append(len(tensor))
        return tensor

    experts, rows = make(gated=True, bias=False), rows_of(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        experts(rows, torch.tensor(SIZES))
    assert sum(sizes) <= 2 * sum(SIZES)


def test_an_activation_that_learns_learns() -> None:
    slope = nn.PReLU()
    experts = Experts(2, 4, 6, activation=slope)
    experts(torch.randn(5, 4), torch.tensor([2, 3])).sum().backward()
    assert slope.weight.grad is not None and slope.weight.grad.any()


@pytest.mark.parametrize(
    ("in_place", "plain"),
    [
        (nn.ReLU(inplace=True), nn.ReLU()),
        (nn.SiLU(inplace=True), nn.SiLU()),
        (torch.sigmoid_, torch.sigmoid),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_an_activation_may_write_into_what_it_reads(
    in_place: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], gated: bool
) -> None:
    found = []
    for activation in (plain, in_place):
        experts, rows = make(gated=gated), rows_of(torch.float32).requires_grad_()
        experts.activation = activation
        out = experts(rows, torch.tensor(SIZES))
        out.square().sum().backward()
        found.append([out.detach(), rows.grad, *(one.grad for one in experts.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_in_inference_mode_the_answer_is_the_same() -> None:
    experts, rows = make(), rows_of(torch.float32)
    out = experts(rows, torch.tensor(SIZES))
    with torch.inference_mode():
        torch.testing.assert_close(experts(rows.clone(), torch.tensor(SIZES)), out, rtol=0, atol=0)
