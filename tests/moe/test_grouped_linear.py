"""Products of rows that are grouped by expert."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe import grouped_linear
from moe_dist.moe.grouped_linear import Groups

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
        group = grouped_linear._group(torch.ones(num_rows, 1).bfloat16(), slice(0, num_rows))
        assert group.sum() == num_rows
        assert num_rows <= len(group) < max(num_rows + 16, 1.13 * num_rows)
        widths.add(len(group))
    assert len(widths) < 60
