"""One linear layer whose experts are merged for each group of tokens, part by part.

No weight of every group lies in memory, and no graph keeps one: backward merges anew.

Shapes: T tokens, G groups, C of them at a time, K chosen experts, E experts, U used ones, I input
width, O output width, N numbers of a part of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.moe.grouped_linear import multiply_rows, rows_of_group
from moe_dist.moe.on_device import bring

OWN_MERGE_COST = 8
"""How much more than in one product for all groups it costs where each adds up its own experts."""
PART_BYTES = 32 * 2**20
"""What merged weights may take at a time."""
GROUPS_AT_ONCE = 8


def merged_linear(
    rows_TI: Tensor, weight_EOI: Tensor, ids_GK: Tensor, weights_GK: Tensor, sizes: list[int]
) -> Tensor:
    """Multiply rows that are sorted by group, of which each has `sizes`, with its merge: (T, O)."""
    return cast(Tensor, _MergedLinear.apply(rows_TI, weight_EOI, ids_GK, weights_GK, sizes))


class _Mix:
    """The merge of some groups, for one part of the weights after another.

    One product with a (G, U) matrix reads the used experts once for all groups; where they are many
    more than K, each group adds up its own.
    """

    def __init__(
        self, ids_GK: Tensor, weights_GK: Tensor, num_experts: int, dtype: torch.dtype
    ) -> None:
        used_U, places = torch.unique(ids_GK, return_inverse=True)
        self._places_GK = places.view_as(ids_GK)
        weights_GU = weights_GK.new_zeros(ids_GK.shape[0], used_U.numel())
        self._weights_GU = weights_GU.scatter_add_(1, self._places_GK, weights_GK).to(dtype)
        self._used_U = None if used_U.numel() == num_experts else used_U
        self._own: list[list[tuple[int, float]]] | None = None
        if used_U.numel() > OWN_MERGE_COST * ids_GK.shape[1]:
            pairs = zip(ids_GK.tolist(), weights_GK.tolist(), strict=True)
            self._own = [list(zip(*one, strict=True)) for one in pairs]

    def merge(self, part_EN: Tensor, out_GN: Tensor) -> None:
        """Merge a part of the stacked weights."""
        if self._own is None:
            torch.mm(self._weights_GU, self._used(part_EN), out=out_GN)
            return
        for own, out_N in zip(self._own, out_GN, strict=True):
            out_N.zero_()
            for expert, weight in own:
                out_N.add_(part_EN[expert], alpha=weight)

    def add_gradient(self, grad_GN: Tensor, grad_part_EN: Tensor) -> None:
        """Add what the experts get of the gradient of the merged part, in place."""
        if self._own is not None:
            for own, grad_N in zip(self._own, grad_GN, strict=True):
                for expert, weight in own:
                    grad_part_EN[expert].add_(grad_N, alpha=weight)
        elif self._used_U is None:
            grad_part_EN.addmm_(self._weights_GU.t(), grad_GN)
        else:
            grad_part_EN.index_add_(0, self._used_U, self._weights_GU.t() @ grad_GN)

    def weight_gradient(self, grad_GN: Tensor, part_EN: Tensor) -> Tensor:
        """Give the gradient of the (G, K) weights."""
        if self._own is None:
            return (grad_GN @ self._used(part_EN).t()).gather(1, self._places_GK)
        products = [
            torch.stack([torch.dot(part_EN[expert], grad_N) for expert, _ in own])
            for own, grad_N in zip(self._own, grad_GN, strict=True)
        ]
        return torch.stack(products)

    def _used(self, part_EN: Tensor) -> Tensor:
        return part_EN if self._used_U is None else part_EN.index_select(0, self._used_U)


@dataclass(frozen=True)
class _Part:
    """Some groups and some output neurons, whose merged weights lie in memory at one time."""

    mix: _Mix
    groups_C: Tensor
    rows: list[slice]
    neurons: slice

    def of(self, weight_EOI: Tensor) -> Tensor:
        """View these neurons' weights of all experts, (E, N)."""
        num_experts, _, width = weight_EOI.shape
        start, stop = self.neurons.start * width, self.neurons.stop * width
        return weight_EOI.view(num_experts, -1)[:, start:stop]


def _parts(
    weight_EOI: Tensor, ids_GK: Tensor, weights_GK: Tensor, sizes: list[int]
) -> Iterator[_Part]:
    num_experts, num_neurons, width = weight_EOI.shape
    found, start = [], 0
    for group, size in enumerate(sizes):
        if size:
            found.append((group, slice(start, start + size)))
        start += size
    for first in range(0, len(found), GROUPS_AT_ONCE):
        chosen = found[first : first + GROUPS_AT_ONCE]
        which = bring(torch.tensor([group for group, _ in chosen], device="cpu"), ids_GK.device)
        mix = _Mix(ids_GK[which], weights_GK[which], num_experts, weight_EOI.dtype)
        step = _neurons_at_once(num_neurons, len(chosen) * width * weight_EOI.element_size())
        for neuron in range(0, num_neurons, step):
            neurons = slice(neuron, min(neuron + step, num_neurons))
            yield _Part(mix, which, [rows for _, rows in chosen], neurons)


def _neurons_at_once(num_neurons: int, neuron_bytes: int) -> int:
    """Divide neurons into parts of equal size: a small rest would be multiplied slowly."""
    num_parts = math.ceil(num_neurons * neuron_bytes / PART_BYTES)
    return min(num_neurons, max(1, math.ceil(num_neurons / num_parts)))


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_TI: Tensor,
        weight_EOI: Tensor,
        ids_GK: Tensor,
        weights_GK: Tensor,
        sizes: list[int],
    ) -> Tensor:
        ctx.save_for_backward(rows_TI, weight_EOI, ids_GK, weights_GK)
        ctx.sizes = sizes
        out_TO = rows_TI.new_empty(rows_TI.shape[0], weight_EOI.shape[1])
        with torch.autocast(rows_TI.device.type, enabled=False):
            buffer = _Buffer()
            for part in _parts(weight_EOI, ids_GK, weights_GK, sizes):
                merged_GOI = buffer.merged(part, weight_EOI).to(rows_TI.dtype)
                for rows, own_OI in zip(part.rows, merged_GOI, strict=True):
                    multiply_rows(rows_TI, own_OI.t(), None, out_TO[:, part.neurons], rows)
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TO: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        rows_TI, weight_EOI, ids_GK, weights_GK = ctx.saved_tensors
        for_rows, for_weight, _, for_choice, _ = ctx.needs_input_grad
        grad_rows_TI = torch.zeros_like(rows_TI) if for_rows else None
        grad_EOI = torch.zeros_like(weight_EOI) if for_weight else None
        grad_GK = torch.zeros_like(weights_GK) if for_choice else None
        # The gradient of a sum is expanded, which products of its parts would read slowly.
        grad_TO = grad_TO.contiguous()
        with torch.autocast(grad_TO.device.type, enabled=False):
            buffer = _Buffer()
            for part in _parts(weight_EOI, ids_GK, weights_GK, ctx.sizes):
                own_grads_TO = [rows_of_group(grad_TO[:, part.neurons], rows) for rows in part.rows]
                if grad_rows_TI is not None:
                    merged_GOI = buffer.merged(part, weight_EOI).to(rows_TI.dtype)
                    for rows, own_OI, own_TO in zip(
                        part.rows, merged_GOI, own_grads_TO, strict=True
                    ):
                        _add_product(grad_rows_TI[rows], own_TO, own_OI)
                if grad_EOI is None and grad_GK is None:
                    continue
                products = [
                    own_TO.t() @ rows_of_group(rows_TI, rows)
                    for rows, own_TO in zip(part.rows, own_grads_TO, strict=True)
                ]
                merged_grad_GN = torch.stack(products).flatten(1).to(weight_EOI.dtype)
                if grad_EOI is not None:
                    part.mix.add_gradient(merged_grad_GN, part.of(grad_EOI))
                if grad_GK is not None:
                    own_CK = part.mix.weight_gradient(merged_grad_GN, part.of(weight_EOI))
                    grad_GK.index_add_(0, part.groups_C, own_CK.to(grad_GK.dtype))
        return grad_rows_TI, grad_EOI, None, grad_GK, None


def _add_product(out_TI: Tensor, grad_TO: Tensor, weight_OI: Tensor) -> None:
    if len(grad_TO) == len(out_TI):
        out_TI.addmm_(grad_TO, weight_OI)
    else:
        out_TI.add_((grad_TO @ weight_OI)[: len(out_TI)])


class _Buffer:
    """Where one part after another is merged: fresh memory would cost as much as the merge."""

    def __init__(self) -> None:
        self._numbers: Tensor | None = None

    def merged(self, part: _Part, weight_EOI: Tensor) -> Tensor:
        """Merge a part: (G, o, I), valid until the next one."""
        num_groups, width = len(part.rows), weight_EOI.shape[2]
        size = (part.neurons.stop - part.neurons.start) * width
        if self._numbers is None or len(self._numbers) < num_groups * size:
            self._numbers = weight_EOI.new_empty(num_groups * size)
        out_GN = self._numbers[: num_groups * size].view(num_groups, size)
        part.mix.merge(part.of(weight_EOI), out_GN)
        return out_GN.view(num_groups, -1, width)
