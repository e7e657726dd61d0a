"""Bring each token to its experts and the results back.

No token is dropped here; those that `Routing.kept` leaves out never start.

Shapes: T tokens, D model, E experts, K active experts; a slot is one of the T*K pairs of a token
and one of its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.moe.experts import Experts, compute_dtype
from moe_dist.moe.on_device import count_ids
from moe_dist.moe.routing import Routing


@dataclass(frozen=True)
class SlotOrder:
    """Slots sorted by expert, and the way back.

    Args:
        slots: (N,) the slot at each sorted position; slot // K is its token. N is T*K, or the
            number of slots that are kept.
        positions_TK: (T, K) the sorted position of each slot; 0 for one that is not kept.
        tokens_per_expert_E: (E,) slots of each expert.
        kept_TK: (T, K) bool, or None if all are kept.
    """

    slots: Tensor
    positions_TK: Tensor
    tokens_per_expert_E: Tensor
    kept_TK: Tensor | None = None


class Dispatcher(Protocol):
    """Applies the chosen experts to every token, wherever the experts live."""

    def __call__(self, hidden_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Return the weighted sum of each token's experts, (T, D)."""
        ...


class LocalDispatcher:
    """Sort tokens by expert, compute each group, put the results back."""

    def __call__(self, hidden_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Give the (T, D) weighted sums, in `compute_dtype` of the input."""
        # An accelerator computes what is not kept too, with weight 0: how many rows are left is
        # known to the device alone, and the host would have to ask.
        kept_TK = routing.kept if hidden_TD.device.type == "cpu" else None
        order = sort_slots(routing.expert_ids, experts.num_experts, kept_TK)
        sorted_SD = permute(hidden_TD.to(compute_dtype(hidden_TD)), order)
        return unpermute(experts(sorted_SD, order.tokens_per_expert_E), routing, order)


def sort_slots(expert_ids_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> SlotOrder:
    """Sort slots by expert; equal experts keep the order of their tokens.

    Args:
        expert_ids_TK: experts of each token.
        num_experts: E.
        kept_TK: False for slots to leave out; None keeps all. It costs a synchronisation with
            the device, to learn how many are kept.

    Returns:
        The order.
    """
    expert_ids = expert_ids_TK.reshape(-1)
    if kept_TK is not None:
        # What is left out sorts behind the last expert.
        expert_ids = expert_ids.masked_fill(~kept_TK.reshape(-1), num_experts)
    slots = expert_ids.argsort(stable=True)
    positions = torch.empty_like(slots)
    positions[slots] = torch.arange(slots.numel(), device=slots.device)
    positions_TK = positions.view(expert_ids_TK.shape)
    tokens_per_expert_E = count_ids(expert_ids, num_experts + 1)[:num_experts]
    if kept_TK is not None:
        slots = slots[: int(tokens_per_expert_E.sum())]
        positions_TK = positions_TK * kept_TK
    return SlotOrder(slots, positions_TK, tokens_per_expert_E, kept_TK)


def permute(hidden_TD: Tensor, order: SlotOrder) -> Tensor:
    """Copy each token to the sorted positions of its slots: (N, D) rows grouped by expert."""
    return cast(Tensor, _Permute.apply(hidden_TD, order))


def unpermute(sorted_SD: Tensor, routing: Routing, order: SlotOrder) -> Tensor:
    """Undo `permute` and add each token's results, weighted (0 for slots not kept): (T, D)."""
    weights_TK = None if routing.unit_weights else routing.expert_weights.to(sorted_SD.dtype)
    return cast(Tensor, _Unpermute.apply(sorted_SD, weights_TK, order))


# Autograd would turn each gather into a scatter-add; a permutation's gradient is a gather too.
class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, order: SlotOrder) -> Tensor:
        ctx.order = order
        return hidden_TD.index_select(0, _tokens(order))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None]:
        order: SlotOrder = ctx.order
        kept_TK = None if order.kept_TK is None else order.kept_TK.to(grad_SD.dtype)
        return _gather_weighted(grad_SD, order.positions_TK, kept_TK), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sorted_SD: Tensor, weights_TK: Tensor | None, order: SlotOrder) -> Tensor:
        ctx.order = order
        learns_weights = weights_TK is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(sorted_SD if learns_weights else None, weights_TK)
        return _gather_weighted(sorted_SD, order.positions_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        sorted_SD, weights_TK = ctx.saved_tensors
        order: SlotOrder = ctx.order
        grad_sorted_SD, grad_weights_TK = None, None
        grad_SD = grad_TD.index_select(0, _tokens(order))
        if sorted_SD is not None:
            products_S = torch.linalg.vecdot(grad_SD, sorted_SD)
            grad_weights_TK = _gather_products(products_S, order)
        if ctx.needs_input_grad[0]:
            grad_sorted_SD = grad_SD
            if weights_TK is not None:
                grad_sorted_SD.mul_(weights_TK.reshape(-1)[order.slots].unsqueeze(1))
        return grad_sorted_SD, grad_weights_TK, None


def _tokens(order: SlotOrder) -> Tensor:
    top_k = order.positions_TK.shape[1]
    return order.slots if top_k == 1 else order.slots // top_k


def _gather_products(products_S: Tensor, order: SlotOrder) -> Tensor:
    if order.kept_TK is None:
        return products_S[order.positions_TK]
    if not products_S.numel():
        return products_S.new_zeros(order.positions_TK.shape)
    return products_S[order.positions_TK].masked_fill(~order.kept_TK, 0.0)


def _gather_weighted(rows_SD: Tensor, positions_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Sum the K rows of each token, times their weights; never more than (T, D) at a time."""
    if not rows_SD.shape[0]:
        return rows_SD.new_zeros(positions_TK.shape[0], rows_SD.shape[1])
    total_TD = rows_SD.index_select(0, positions_TK[:, 0])
    if weights_TK is not None:
        total_TD.mul_(weights_TK[:, :1])
    for k in range(1, positions_TK.shape[1]):
        row_TD = rows_SD.index_select(0, positions_TK[:, k])
        if weights_TK is None:
            total_TD.add_(row_TD)
        else:
            total_TD.addcmul_(row_TD, weights_TK[:, k : k + 1])
    return total_TD
