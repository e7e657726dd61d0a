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


def _empty_stack(weight_EOI: Tensor) -> Tensor:
    """Memory for a gradient, expert after expert, however the weights lie."""
    return torch.empty_like(weight_EOI, memory_format=torch.contiguous_format)


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
            grad_RO = rows_of_group(grad_TO, rows)
            # Beside zeros it does not matter what the next expert's rows are.
            self.add_group(expert, grad_RO, with_next_rows(rows_TI, rows), weight_EOI)
        return self.end_product(weight_EOI)

    def add_group(self, expert: int, grad_RO: Tensor, rows_RI: Tensor, weight_EOI: Tensor) -> None:
        """Add one expert's part of a product's share, whose end `end_product` tells.

        The sum is of the weights' dtype. An expert's share is brought to it while it is in the
        cache, for the whole stack's would be written and read once more.
        """
        if self._sum_EOI is None:
            self._sum_EOI = _empty_stack(weight_EOI)
        sum_OI, is_first = self._sum_EOI[expert], expert not in self._written
        self._written.add(expert)
        if sum_OI.dtype is not rows_RI.dtype:
            own_OI = grad_RO.t() @ rows_RI
            if is_first:
                sum_OI.copy_(own_OI)
            else:
                sum_OI.add_(own_OI)
        elif is_first:
            torch.mm(grad_RO.t(), rows_RI, out=sum_OI)
        else:
            sum_OI.addmm_(grad_RO.t(), rows_RI)

    def open(self, weight_EOI: Tensor, experts: list[int]) -> tuple[Tensor, list[bool]]:
        """Give the buffer, for experts to be written, and of which experts it holds something.

        To what it holds is to be added; `end_product` tells that all is done.
        """
        if self._sum_EOI is None:
            self._sum_EOI = _empty_stack(weight_EOI)
        self._sum_EOI = self._sum_EOI.contiguous()
        begun = [expert in self._written for expert in range(weight_EOI.shape[0])]
        self._written.update(experts)
        return self._sum_EOI, begun

    def end_product(self, weight_EOI: Tensor) -> Tensor | None:
        """Give (E, O, I) after the last product, before it None."""
        if self._sum_EOI is None:
            self._sum_EOI = _empty_stack(weight_EOI)
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
    cast_EOI: Tensor | None = None,
) -> Tensor:
    """Apply each expert's linear layer to its own rows: (T, O) of their dtype.

    Args:
        rows_TI: grouped by expert.
        weight_EOI: weights, of which the gradient has the dtype.
        bias_EO: of the rows' dtype.
        groups: where each expert's rows lie.
        weight_grad: shared with the other products of these weights, if there are any.
        cast_EOI: the weights in the rows' dtype, where they are at hand.

    Returns:
        The products.
    """
    if weight_EOI.shape[0] == 1 and weight_grad is None:
        # A view: the gradient of an index would be a second copy of the weights.
        bias_O = None if bias_EO is None else bias_EO.squeeze(0)
        return F.linear(rows_TI, weight_EOI.squeeze(0).to(rows_TI.dtype), bias_O)
    total = GradientSum() if weight_grad is None else weight_grad
    if cast_EOI is None:
        cast_EOI = weight_EOI.detach().to(rows_TI.dtype)
    return cast(Tensor, _GroupedLinear.apply(rows_TI, weight_EOI, bias_EO, groups, total, cast_EOI))


def multiply_rows(
    rows_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None, out_TO: Tensor, rows: slice
) -> None:
    """Apply a linear layer to one group's rows, and write the result into those of `out_TO`."""
    group_TI = rows_of_group(rows_TI, rows)
    out = out_TO[rows]
    if group_TI.shape[0] != out.shape[0]:
        out.copy_(F.linear(group_TI, weight_IO.t(), bias_O)[: out.shape[0]])
    else:
        _multiply(group_TI, weight_IO, bias_O, out)


def _multiply(rows_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> None:
    if bias_O is None:
        torch.mm(rows_TI, weight_IO, out=out_TO)
    else:
        torch.addmm(bias_O, rows_TI, weight_IO, out=out_TO)


def multiply_groups(
    rows_TI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    out_TO: Tensor,
    rows_of_experts: list[tuple[int, slice]],
) -> None:
    """Apply each expert's linear layer to its group's rows, and write into those of `out_TO`.

    A group that is filled up to a round number takes the next expert's first rows along: what it
    writes there is written again when that expert's turn comes.
    """
    for expert, rows in rows_of_experts:
        bias_O = None if bias_EO is None else bias_EO[expert]
        num_rows = rows.stop - rows.start
        if _needs_round(rows_TI):
            num_rows += _missing_rows(num_rows)
        if rows.start + num_rows <= rows_TI.shape[0]:
            own = slice(rows.start, rows.start + num_rows)
            _multiply(rows_TI[own], weight_EIO[expert], bias_O, out_TO[own])
        else:
            multiply_rows(rows_TI, weight_EIO[expert], bias_O, out_TO, rows)


def rows_of_group(rows_TI: Tensor, rows: slice) -> Tensor:
    """Take one expert's rows, on a CPU in half precision with zeros below up to a round number.

    oneDNN compiles a kernel for each number of rows that it meets (0.8 MB; longer than a hundred
    rows take to multiply) and keeps a thousand of them, while experts get other numbers each time.
    """
    group_TI = rows_TI[rows]
    missing = _missing_rows(group_TI.shape[0]) if _needs_round(group_TI) else 0
    return F.pad(group_TI, (0, 0, 0, missing)) if missing else group_TI


def with_next_rows(rows_TI: Tensor, rows: slice) -> Tensor:
    """Take one expert's rows as `rows_of_group`, but those of the next ones in place of zeros.

    It copies nothing but at the end; what is made of the further rows is not to be read.
    """
    stop = rows.stop
    if _needs_round(rows_TI):
        stop += _missing_rows(rows.stop - rows.start)
    return rows_TI[rows.start : stop] if stop <= rows_TI.shape[0] else rows_of_group(rows_TI, rows)


def _needs_round(rows_TI: Tensor) -> bool:
    return rows_TI.device.type == "cpu" and rows_TI.dtype in (torch.bfloat16, torch.float16)


def _missing_rows(num_rows: int) -> int:
    """Space round numbers of rows by 16, and from 256 on by an eighth to a sixteenth."""
    return -num_rows % int(max(16, 2 ** (num_rows.bit_length() - 4)))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_TI: Tensor,
        weight_EOI: Tensor,
        bias_EO: Tensor | None,
        groups: Groups,
        weight_grad: GradientSum,
        cast_EOI: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows_TI, weight_EOI, cast_EOI)
        ctx.groups, ctx.weight_grad = groups, weight_grad
        if groups.sizes is None:
            return _forward_on_device(rows_TI, cast_EOI, bias_EO, groups)
        out_TO = rows_TI.new_empty(rows_TI.shape[0], weight_EOI.shape[1])
        multiply_groups(rows_TI, cast_EOI.transpose(1, 2), bias_EO, out_TO, groups.rows())
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TO: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        rows_TI, weight_EOI, cast_EOI = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        # The gradient of a sum is expanded, which matrix products of groups do not take.
        grad_TO = grad_TO.contiguous()
        with torch.autocast(grad_TO.device.type, enabled=False):
            differentiate = _backward_on_device if ctx.groups.sizes is None else _backward_by_group
            grads = differentiate(
                *(grad_TO, rows_TI, weight_EOI, cast_EOI),
                *(ctx.groups, needs, ctx.weight_grad),
            )
        return *grads, None, None, None


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _backward_by_group(
    grad_TO: Tensor,
    rows_TI: Tensor,
    weight_EOI: Tensor,
    cast_EOI: Tensor,
    groups: Groups,
    needs: tuple[bool, ...],
    weight_grad: GradientSum,
) -> Grads:
    rows_of_experts = groups.rows()
    grad_rows_TI = torch.empty_like(rows_TI) if needs[0] else None
    grad_bias_EO = grad_TO.new_zeros(cast_EOI.shape[:2]) if needs[2] else None
    if grad_rows_TI is not None:
        multiply_groups(grad_TO, cast_EOI, None, grad_rows_TI, rows_of_experts)
    if grad_bias_EO is not None:
        for expert, rows in rows_of_experts:
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
    cast_EOI: Tensor,
    groups: Groups,
    needs: tuple[bool, ...],
    weight_grad: GradientSum,
) -> Grads:
    grad_rows_TI = F.grouped_mm(grad_TO, cast_EOI, offs=groups.ends_E) if needs[0] else None
    grad_weight_EOI = None
    if needs[1]:
        assert groups.ends_E is not None
        own_EOI = F.grouped_mm(grad_TO.t(), rows_TI.contiguous(), offs=groups.ends_E)
        # On Blackwell the kernel leaves what it finds in memory where a group has no rows.
        starts_E = F.pad(groups.ends_E[:-1], (1, 0))
        own_EOI.masked_fill_((groups.ends_E == starts_E).view(-1, 1, 1), 0.0)
        grad_weight_EOI = weight_grad.add_stack(own_EOI.to(weight_EOI.dtype))
    grad_bias_EO = None
    if needs[2]:
        assert groups.expert_of_row_T is not None
        # A product with one-hot rows instead of index_add_: no atomics, so it is deterministic.
        one_hot_TE = F.one_hot(groups.expert_of_row_T, len(cast_EOI)).to(grad_TO.dtype)
        grad_bias_EO = one_hot_TE.t() @ grad_TO
    return grad_rows_TI, grad_weight_EOI, grad_bias_EO
