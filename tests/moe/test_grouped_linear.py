"""Products of rows that are grouped by expert."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe import grouped_linear
from moe_dist.moe.grouped_linear import GradientSum, Groups, group_rows

SIZES = [1, 0, 16, 17, 130, 36]


def products(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition: each expert's own linear layer on its own rows."""
    ends = torch.tensor([0, *SIZES]).cumsum(0).tolist()
    return torch.cat(
        [
            F.linear(rows[start:end], weight[expert], None if bias is None else bias[expert])
            for expert, (start, end) in enumerate(pairwise(ends))
        ]
    )


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_outputs_and_gradients_are_those_of_each_expert_alone(
    dtype: torch.dtype, tolerance: float, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(SIZES), 24), (len(SIZES), 40, 24), (len(SIZES), 40)]
    values = [torch.randn(shape, generator=generator) / 4 for shape in shapes]
    slope = torch.randn(sum(SIZES), 40, generator=generator) / 4
    results = []
    for is_oracle, kind in ((False, dtype), (True, torch.float32)):
        # What the oracle gets is rounded to the dtype, too.
        inputs = [value.to(dtype).to(kind).requires_grad_() for value in values]
        bias = inputs[2] if has_bias else None
        if is_oracle:
            out = products(inputs[0], inputs[1], bias)
        else:
            out = grouped_linear.grouped_linear(inputs[0], inputs[1], bias, Groups(SIZES))
        out.backward(slope.to(dtype).to(kind))
        grads = [one.grad.float() for one in inputs[: 2 + has_bias] if one.grad is not None]
        results.append([out.float(), *grads])
    assert len(results[0]) == len(results[1]) == 3 + has_bias
    for fast, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast, exact, atol=tolerance, rtol=tolerance)


def test_kernels_in_half_precision_see_few_numbers_of_rows() -> None:
    widths = set()
    for num_rows in range(1, 4097):
        group = grouped_linear.rows_of_group(torch.ones(num_rows, 1).bfloat16(), slice(0, num_rows))
        assert group.sum() == num_rows
        assert num_rows <= len(group) < max(num_rows + 16, 1.13 * num_rows)
        widths.add(len(group))
    assert len(widths) < 60


def on_device(counts: list[int], width: int = 16) -> tuple[Tensor, Tensor, Tensor, Groups]:
    """Rows, weights and biases, and groups whose sizes only the device knows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), width, generator=generator, requires_grad=True)
    weight = torch.randn(len(counts), 8, width, generator=generator, requires_grad=True)
    bias = torch.randn(len(counts), 8, generator=generator, requires_grad=True)
    groups = group_rows(torch.tensor(counts), rows, on_device=True)
    return rows, weight, bias, groups


def test_a_group_without_rows_has_no_gradient_whatever_the_kernel_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = F.grouped_mm

    def careless(one: Tensor, other: Tensor, *, offs: Tensor) -> Tensor:
        # As on Blackwell: what was in memory stays where a group has no rows.
        out = real(one, other, offs=offs)
        if one.dim() == other.dim() == 2:
            empty = torch.diff(offs, prepend=offs.new_zeros(1)) == 0
            out[empty] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", careless)
    rows, weight, bias, groups = on_device([0, 5, 0, 3])
    grouped_linear.grouped_linear(rows, weight, bias, groups).square().sum().backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())
    assert not weight.grad[[0, 2]].any() and weight.grad[[1, 3]].any(dim=(1, 2)).all()


def test_no_rows_at_all_give_zeros() -> None:
    # The gradient of a sum is expanded, and over no rows `contiguous` leaves it so.
    rows, weight, bias, groups = on_device([0, 0])
    out = grouped_linear.grouped_linear(rows, weight, bias, groups)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert rows.grad is not None and weight.grad is not None and bias.grad is not None
    assert rows.grad.shape == rows.shape
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("first", ["stack", "groups"])
def test_gradients_of_both_kinds_add_up(first: str) -> None:
    weight = torch.zeros(2, 3, 4)
    stack = torch.ones(2, 3, 4)
    grad, rows = torch.ones(1, 3), torch.full((1, 4), 2.0)
    total = GradientSum(2)
    parts = [
        lambda: total.add_stack(stack.clone()),
        lambda: total.add_groups(grad, rows, weight, [(1, slice(0, 1))]),
    ]
    found = [part() for part in (parts if first == "stack" else parts[::-1])]
    assert found[0] is None and found[1] is not None
    torch.testing.assert_close(found[1][0], torch.ones(3, 4))
    torch.testing.assert_close(found[1][1], torch.full((3, 4), 3.0))
