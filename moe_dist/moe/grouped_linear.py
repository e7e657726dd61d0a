"""One linear layer with stacked weights over tokens that are already grouped by expert.

Indexing a stacked parameter in a Python loop allocates a gradient of the whole stack for each
expert. Here forward and backward write each group's result straight into one output.
Shapes: T tokens, E experts, I input width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.moe.on_device import bring, has_grouped_products


@dataclass(frozen=True)
class Groups:
    """Where each expert's rows lie; known either to the host or to the device.

    Args:
        sizes: rows of each expert, on the host.
        ends_E: (E,) int32 cumulative rows: expert e owns those between ends[e-1] and ends[e].
        expert_of_row_T: (T,) int64.
    """

    sizes: list[int] | None = None
    ends_E: Tensor | None = None
    expert_of_row_T: Tensor | None = None

    def rows(self) -> list[tuple[int, slice]]:
        """List the experts that have rows, each with its slice of them."""
        assert self.sizes is not None
        found = []
        start = 0
        for expert, size in enumerate(self.sizes):
            if size:
                found.append((expert, slice(start, start + size)))
            start += size
        return found


class GradientSum:
    """The weight gradient of several grouped products with the same weights, in one buffer.

    Autograd would allocate a stack of gradients for each product and add them up. The last product
    to be differentiated hands the sum out, so all must belong to one output.

    Args:
        num_products: how many products share the weights.
    """

    def __init__(self, num_products: int = 1) -> None:
        self.num_products = num_products
        self._pending = num_products
        self._sum_EOI: Tensor | None = None
        self._written: set[int] = set()

    def add_groups(
        self,
        grad_TO: Tensor,
        rows_TI: Tensor,
        weight_EOI: Tensor,
        rows_of_experts: list[tuple[int, slice]],
    ) -> Tensor | None:
        """Add one product's share expert by expert: (E, O, I) after the last, before it None."""
        for expert, rows in rows_of_experts:
            grad_RO, rows_RI = rows_of_group(grad_TO, rows), rows_of_group(rows_TI, rows)
            self.add_group(expert, grad_RO, rows_RI, weight_EOI)
        return self.end_product(weight_EOI)

    def add_group(self, expert: int, grad_RO: Tensor, rows_RI: Tensor, weight_EOI: Tensor) -> None:
        """Add one expert's part of a product's share, whose end `end_product` tells."""
        if self._sum_EOI is None:
            self._sum_EOI = torch.empty_like(weight_EOI)
        if expert in self._written:
            self._sum_EOI[expert].addmm_(grad_RO.t(), rows_RI)
        else:
            torch.mm(grad_RO.t(), rows_RI, out=self._sum_EOI[expert])
            self._written.add(expert)

    def end_product(self, weight_EOI: Tensor) -> Tensor | None:
        """Give (E, O, I) after the last product, before it None."""
        if self._sum_EOI is None:
            self._sum_EOI = torch.empty_like(weight_EOI)
        return self._hand_out()

    def add_stack(self, grad_EOI: Tensor) -> Tensor | None:
        """Add one product's share as `add_groups` does, but whole; it may be changed later."""
        if self._sum_EOI is None:
            self._sum_EOI = grad_EOI
        else:
            self._clear_unwritten()
            self._sum_EOI.add_(grad_EOI)
        self._written = set(range(grad_EOI.shape[0]))
        return self._hand_out()

    def _clear_unwritten(self) -> None:
        assert self._sum_EOI is not None
        for expert in set(range(self._sum_EOI.shape[0])) - self._written:
            self._sum_EOI[expert].zero_()

    def _hand_out(self) -> Tensor | None:
        self._pending -= 1
        if self._pending:
            return None
        self._clear_unwritten()
        total_EOI, self._sum_EOI = self._sum_EOI, None
        # A graph may be differentiated again.
        self._pending, self._written = self.num_products, set()
        return total_EOI


def group_rows(tokens_per_expert_E: Tensor, rows_TI: Tensor, *, on_device: bool) -> Groups:
    """Turn counts into group boundaries; with `on_device` the host need not wait for the counts."""
    if not rows_TI.shape[0]:
        return Groups([0] * tokens_per_expert_E.shape[0])
    if not on_device:
        sizes = tokens_per_expert_E.tolist()
        assert sum(sizes) == rows_TI.shape[0], "tokens_per_expert does not sum to the rows"
        return Groups(sizes)
    counts_E = bring(tokens_per_expert_E, rows_TI.device)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    experts_E = torch.arange(counts_E.shape[0], device=counts_E.device)
    expert_of_row_T = torch.repeat_interleave(experts_E, counts_E, output_size=rows_TI.shape[0])
    return Groups(None, ends_E, expert_of_row_T)


def can_use_grouped_mm(rows_TI: Tensor, weight_EOI: Tensor) -> bool:
    """Tell whether `grouped_linear` may get groups whose sizes only the device knows.

    On CPU the loop is as fast and fuses the bias, so grouped_mm serves accelerators only.
    """
    aligned = all(width * rows_TI.element_size() % 16 == 0 for width in weight_EOI.shape[1:])
    is_half = rows_TI.dtype is torch.bfloat16
    return is_half and aligned and has_grouped_products(rows_TI.device)


def grouped_linear(
    rows_TI: Tensor,
    weight_EOI: Tensor,
    bias_EO: Tensor | None,
    groups: Groups,
    weight_grad: GradientSum | None = None,
) -> Tensor:
    """Apply each expert's linear layer to its own rows (of the weights' dtype): (T, O).

    `weight_grad` is shared with the other products of these weights, if there are any.
    """
    if weight_EOI.shape[0] == 1 and weight_grad is None:
        # A view: the gradient of an index would be a second copy of the weights.
        return F.linear(
            rows_TI, weight_EOI.squeeze(0), None if bias_EO is None else bias_EO.squeeze(0)
        )
    total = GradientSum() if weight_grad is None else weight_grad
    return cast(Tensor, _GroupedLinear.apply(rows_TI, weight_EOI, bias_EO, groups, total))


def multiply_rows(
    rows_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None, out_TO: Tensor, rows: slice
) -> None:
    """Apply a linear layer to one group's rows, and write the result into those of `out_TO`."""
    group_TI = rows_of_group(rows_TI, rows)
    out = out_TO[rows]
    if group_TI.shape[0] != out.shape[0]:
        out.copy_(F.linear(group_TI, weight_IO.t(), bias_O)[: out.shape[0]])
    elif bias_O is None:
        torch.mm(group_TI, weight_IO, out=out)
    else:
        torch.addmm(bias_O, group_TI, weight_IO, out=out)


def rows_of_group(rows_TI: Tensor, rows: slice) -> Tensor:
    """Take one expert's rows, on a CPU in half precision with zeros below up to a round number.

    oneDNN compiles a kernel for each number of rows that it meets (0.8 MB; longer than a hundred
    rows take to multiply) and keeps a thousand of them, while experts get other numbers each time.
    """
    group_TI = rows_TI[rows]
    num_rows = group_TI.shape[0]
    if group_TI.device.type != "cpu" or group_TI.dtype not in (torch.bfloat16, torch.float16):
        return group_TI
    missing = -num_rows % _row_step(num_rows)
    return F.pad(group_TI, (0, 0, 0, missing)) if missing else group_TI


def _row_step(num_rows: int) -> int:
    """Space round numbers of rows by 16, and from 256 on by an eighth to a sixteenth."""
    return int(max(16, 2 ** (num_rows.bit_length() - 4)))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_TI: Tensor,
        weight_EOI: Tensor,
        bias_EO: Tensor | None,
        groups: Groups,
        weight_grad: GradientSum,
    ) -> Tensor:
        ctx.save_for_backward(rows_TI, weight_EOI)
        ctx.groups, ctx.weight_grad = groups, weight_grad
        if groups.sizes is None:
            return _forward_on_device(rows_TI, weight_EOI, bias_EO, groups)
        out_TO = rows_TI.new_empty(rows_TI.shape[0], weight_EOI.shape[1])
        for expert, rows in groups.rows():
            bias_O = None if bias_EO is None else bias_EO[expert]
            multiply_rows(rows_TI, weight_EOI[expert].t(), bias_O, out_TO, rows)
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TO: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows_TI, weight_EOI = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        # The gradient of a sum is expanded, which matrix products of groups do not take.
        grad_TO = grad_TO.contiguous()
        with torch.autocast(grad_TO.device.type, enabled=False):
            differentiate = _backward_on_device if ctx.groups.sizes is None else _backward_by_group
            grads = differentiate(grad_TO, rows_TI, weight_EOI, ctx.groups, needs, ctx.weight_grad)
        return *grads, None, None


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _backward_by_group(
    grad_TO: Tensor,
    rows_TI: Tensor,
    weight_EOI: Tensor,
    groups: Groups,
    needs: tuple[bool, ...],
    weight_grad: GradientSum,
) -> Grads:
    rows_of_experts = groups.rows()
    grad_rows_TI = torch.empty_like(rows_TI) if needs[0] else None
    grad_bias_EO = grad_TO.new_zeros(weight_EOI.shape[:2]) if needs[2] else None
    for expert, rows in rows_of_experts:
        if grad_rows_TI is not None:
            multiply_rows(grad_TO, weight_EOI[expert], None, grad_rows_TI, rows)
        if grad_bias_EO is not None:
            torch.sum(grad_TO[rows], dim=0, out=grad_bias_EO[expert])
    grad_weight_EOI = None
    if needs[1]:
        grad_weight_EOI = weight_grad.add_groups(grad_TO, rows_TI, weight_EOI, rows_of_experts)
    return grad_rows_TI, grad_weight_EOI, grad_bias_EO


def _forward_on_device(
    rows_TI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, groups: Groups
) -> Tensor:
    out_TO = F.grouped_mm(rows_TI, weight_EOI.transpose(-2, -1), offs=groups.ends_E)
    if bias_EO is not None:
        assert groups.expert_of_row_T is not None
        out_TO += bias_EO.index_select(0, groups.expert_of_row_T)
    return out_TO


def _backward_on_device(
    grad_TO: Tensor,
    rows_TI: Tensor,
    weight_EOI: Tensor,
    groups: Groups,
    needs: tuple[bool, ...],
    weight_grad: GradientSum,
) -> Grads:
    grad_rows_TI = F.grouped_mm(grad_TO, weight_EOI, offs=groups.ends_E) if needs[0] else None
    grad_weight_EOI = None
    if needs[1]:
        assert groups.ends_E is not None
        own_EOI = F.grouped_mm(grad_TO.t(), rows_TI.contiguous(), offs=groups.ends_E)
        # On Blackwell the kernel leaves what it finds in memory where a group has no rows.
        starts_E = F.pad(groups.ends_E[:-1], (1, 0))
        own_EOI.masked_fill_((groups.ends_E == starts_E).view(-1, 1, 1), 0.0)
        grad_weight_EOI = weight_grad.add_stack(own_EOI)
    grad_bias_EO = None
    if needs[2]:
        assert groups.expert_of_row_T is not None
        # A product with one-hot rows instead of index_add_: no atomics, so it is deterministic.
        one_hot_TE = F.one_hot(groups.expert_of_row_T, weight_EOI.shape[0]).to(grad_TO.dtype)
        grad_bias_EO = one_hot_TE.t() @ grad_TO
    return grad_rows_TI, grad_weight_EOI, grad_bias_EO
