"""Experts in native operators give what torch's products give, which are the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.inference.backends.native import load_operators
from moe_dist.moe import MoELayer, build_router
from moe_dist.moe import experts as experts_module
from moe_dist.moe.experts import Experts

WIDTH, NEURONS = 64, 96
# Several chunks of rows and several groups, chunks that are filled up, one row, and none.
SIZES = [1700, 0, 130, 1, 36]


def is_native(dtype: torch.dtype) -> bool:
    experts = make(["gelu", False, False])
    return load_operators() and experts_module.can_use_native_experts(
        torch.zeros(1, WIDTH, dtype=dtype),
        dict(experts.named_parameters()),
        experts.activation,
        [1],
    )


def make(kind: list[object], dtype: torch.dtype = torch.float32) -> Experts:
    activation, gated, bias = kind
    torch.manual_seed(0)
    return Experts(
        len(SIZES), WIDTH, NEURONS, activation=str(activation), gated=bool(gated),
        bias_in=bool(bias), bias_out=bool(bias),
    ).to(dtype)  # fmt: skip


@contextmanager
def without_native() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_module, "can_use_native_experts", lambda *_: False)
        yield


@contextmanager
def native_calls() -> Iterator[list[object]]:
    """Note what native operators are asked for."""
    calls: list[object] = []
    own = experts_module.native_experts

    def noted(*args: object) -> Tensor:
        calls.append(args)
        return own(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_module, "native_experts", noted)
        yield calls


def passes(experts: Experts, rows: Tensor, num_chunks: int = 1) -> dict[str, Tensor]:
    """The outputs and all gradients; a second chunk has rows of the first expert alone."""
    given = rows.detach().requires_grad_()
    part = experts.in_chunks(rows.dtype, num_chunks)
    out = part(given, torch.tensor(SIZES))
    if num_chunks == 2:
        out = torch.cat([out, part(given[:17], torch.tensor([17, 0, 0, 0, 0]))])
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    grads = {name: one.grad for name, one in experts.named_parameters()} | {"rows": given.grad}
    found = {"out": out.detach()}
    for name, grad in grads.items():
        assert grad is not None, name
        found[name] = grad
    return found


KINDS = [
    ["silu", True, False], ["gelu", False, True], ["relu", True, True], ["tanh", False, False],
]  # fmt: skip
PRECISIONS = [
    pytest.param(
        stored, dtype, limit, marks=pytest.mark.skipif(not is_native(dtype), reason="not here")
    )
    for stored, dtype, limit in (
        (torch.float32, torch.float32, 2e-6),
        (torch.float32, torch.bfloat16, 3e-2),
    )
]
needs_native = pytest.mark.skipif(not is_native(torch.float32), reason="not on this processor")


@pytest.mark.parametrize(("stored", "dtype", "limit"), PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_outputs_and_gradients_are_those_of_float64(
    stored: torch.dtype, dtype: torch.dtype, limit: float, kind: list[object], num_chunks: int
) -> None:
    experts = make(kind, stored)
    rows = torch.randn(sum(SIZES), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    with native_calls() as calls:
        found = passes(experts, rows, num_chunks)
    assert len(calls) == num_chunks
    experts.zero_grad()
    exact = passes(experts.double(), rows.double(), num_chunks)
    for name, one in found.items():
        assert one.dtype is (dtype if name in ("out", "rows") else stored), name
        assert one.shape == exact[name].shape
        assert (one - exact[name]).norm() <= limit * exact[name].norm(), name
    assert not found["w_in"][1].any()


@needs_native
def test_gelu_of_tanh_and_its_slope() -> None:
    experts = make(["gelu", False, False])
    rows = torch.randn(sum(SIZES), WIDTH)
    experts.activation = torch.nn.GELU(approximate="tanh")
    expected = passes(experts, rows)
    experts.zero_grad()
    experts.activation = type("GELUTanh", (torch.nn.GELU,), {})(approximate="tanh")
    for name, one in passes(experts, rows).items():
        assert (one - expected[name]).norm() <= 5e-6 * expected[name].norm(), name


@needs_native
def test_only_what_learns_has_a_gradient() -> None:
    experts = make(["silu", True, True])
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name in ("w_gate", "b_out"))
    experts(torch.randn(sum(SIZES), WIDTH), torch.tensor(SIZES)).sum().backward()
    learned = {name for name, one in experts.named_parameters() if one.grad is not None}
    assert learned == {"w_gate", "b_out"}
    counts = torch.tensor(SIZES).float()[:, None].expand(-1, WIDTH)
    torch.testing.assert_close(experts.b_out.grad, counts)


@needs_native
def test_a_graph_may_be_differentiated_again() -> None:
    experts, rows = make(["silu", True, True]), torch.randn(sum(SIZES), WIDTH, requires_grad=True)
    total = experts(rows, torch.tensor(SIZES)).square().sum()
    leaves = [rows, *experts.parameters()]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(total, leaves), strict=True):
        assert torch.equal(one, other)


@needs_native
def test_without_rows_and_without_gradients() -> None:
    experts, none = make(["gelu", False, True]), torch.zeros(0, WIDTH, requires_grad=True)
    out = experts(none, torch.zeros(len(SIZES), dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, WIDTH) and not experts.w_in.grad.any()
    rows = torch.randn(sum(SIZES), WIDTH)
    with torch.inference_mode():
        answer = experts(rows.clone(), torch.tensor(SIZES))
    torch.testing.assert_close(answer, experts(rows, torch.tensor(SIZES)), rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_learns_alike_with_checkpoints_and_autocast(top_k: int) -> None:
    router = build_router("token_gate", d_model=WIDTH, num_experts=len(SIZES), top_k=top_k)
    shared = Experts(1, WIDTH, NEURONS, activation="silu", gated=True, bias_out=False)
    layer = MoELayer(make(["silu", True, True]), router, shared=shared)
    hidden = torch.randn(3, 40, WIDTH)

    def grads() -> list[Tensor]:
        layer.zero_grad()
        given = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            # The same layer two times, the second time computed anew for its gradient.
            out = layer(given) + checkpoint(layer, given.sin(), use_reentrant=False)
        out.float().square().mean().backward()
        found = [given.grad, *(one.grad for one in layer.parameters())]
        return [grad for grad in found if grad is not None]

    found = grads()
    with without_native():
        expected = grads()
    assert len(expected) == 1 + len(list(layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


@needs_native
def test_however_rows_and_weights_lie() -> None:
    experts = make(["silu", True, True])
    rows = torch.randn(WIDTH, sum(SIZES)).t()
    expected = passes(experts, rows.contiguous())
    experts.zero_grad()
    for name, weight in list(experts.named_parameters()):
        turned = weight.detach().transpose(0, -1).contiguous().transpose(0, -1)
        setattr(experts, name, torch.nn.Parameter(turned))
    assert not experts.w_in.is_contiguous()
    with native_calls() as calls:
        found = passes(experts, rows)
    assert len(calls) == 1
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], msg=name)


@needs_native
def test_gradients_of_biases_do_not_lose_what_many_rows_add() -> None:
    experts = make(["gelu", False, True])
    counts = torch.tensor([100_000, 0, 0, 0, 0])
    experts.in_chunks(torch.bfloat16)(torch.randn(100_000, WIDTH), counts).sum().backward()
    assert experts.b_out.grad is not None
    assert (experts.b_out.grad[0] == torch.tensor(100_000.0).bfloat16()).all()


@pytest.mark.skipif(not is_native(torch.bfloat16), reason="not on this processor")
@pytest.mark.parametrize("most", [1024, 1025])
def test_weights_in_bfloat16_where_each_gradient_is_one_product(most: int) -> None:
    experts = make(["silu", True, True], torch.bfloat16)
    sizes = torch.tensor([most, 0, 130, 1, 36])
    rows = torch.randn(int(sizes.sum()), WIDTH).bfloat16()
    with native_calls() as calls:
        experts(rows, sizes).sum().backward()
    assert len(calls) == (most == 1024)
    exact = make(["silu", True, True]).double()
    exact.load_state_dict(experts.state_dict())
    exact(rows.double(), sizes).sum().backward()
    for one, other in zip(experts.parameters(), exact.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert (one.grad - other.grad).norm() <= 0.01 * other.grad.norm()


@needs_native
def test_what_native_operators_are_not_for() -> None:
    """Another's module of a known name, hooks, weights that are not in float32, or not alike."""

    class SiLU(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * torch.nn.functional.silu(x)

    hooked = torch.nn.SiLU()
    hooked.register_forward_hook(lambda *_: None)
    rows, mixed = torch.randn(sum(SIZES), WIDTH), make(["silu", True, False])
    mixed.w_out = torch.nn.Parameter(mixed.w_out.detach().bfloat16())

    def is_asked(experts: Experts, activation: object, dtype: torch.dtype = torch.float32) -> bool:
        experts.activation = activation  # type: ignore[assignment]
        with native_calls() as calls:
            experts(rows.to(dtype), torch.tensor(SIZES))
        return bool(calls)

    for activation in (SiLU(), hooked, lambda x: x):
        assert not is_asked(make(["silu", True, False]), activation)
    assert is_asked(make(["silu", True, False]), torch.nn.SiLU())
    assert not is_asked(make(["silu", True, False]).bfloat16(), torch.nn.SiLU(), torch.bfloat16)
    own = make(["silu", True, False])
    for one, is_for in ((own, True), (mixed, False)):
        weights = dict(one.named_parameters())
        can_use = experts_module.can_use_native_experts
        assert can_use(rows, weights, one.activation, SIZES) == is_for
    with pytest.raises(RuntimeError, match="an expert has -1 rows"):
        own(rows, torch.tensor([-1, SIZES[0] + 1, *SIZES[2:]]))


@needs_native
@pytest.mark.parametrize(("learns", "times"), [("all", 3), ("rows", 2), ("weights", 2)])
def test_flops_are_counted(learns: str, times: int) -> None:
    experts = make(["silu", True, False]).requires_grad_(learns != "rows")
    rows = torch.randn(sum(SIZES), WIDTH, requires_grad=learns != "weights")

    with native_calls() as calls, FlopCounterMode(display=False) as counter:
        out = experts(rows, torch.tensor(SIZES))
        forward = counter.get_total_flops()
        out.sum().backward()
    assert len(calls) == 1
    assert forward == 3 * 2 * sum(SIZES) * WIDTH * NEURONS
    assert counter.get_total_flops() == times * forward
    with without_native(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        experts(rows, torch.tensor(SIZES))
    assert counter.get_total_flops() == forward


@needs_native
def test_gradients_of_gradients_are_refused() -> None:
    experts, rows = make(["silu", True, True]), torch.randn(sum(SIZES), WIDTH, requires_grad=True)
    total = experts(rows, torch.tensor(SIZES)).square().sum()
    (grad,) = torch.autograd.grad(total, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
