"""Dropless dispatch to experts that live on other ranks.

Shapes: T tokens, D model, E experts, K active experts; S = T*K slots that this rank sends, R rows
that it receives, G ranks of the group, L = E / G experts on each.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.distributed.position import collective
from moe_dist.moe import Experts, Routing
from moe_dist.moe.dispatch import permute, sort_slots, unpermute
from moe_dist.moe.experts import compute_dtype


class AllToAllDispatcher:
    """Send each token to the ranks of its experts and bring the results back.

    Every rank of the group holds E / G consecutive experts and may have another number of tokens,
    zero included: counts are exchanged first, nothing is padded or dropped. All ranks of the
    group must call it together, equally often.

    Args:
        group: the expert-parallel process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, hidden_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Apply the chosen experts to every token.

        Args:
            hidden_TD: this rank's tokens.
            routing: their experts, by global number.
            experts: this rank's slice of the experts.

        Returns:
            (T, D) weighted sums, in `compute_dtype` of the input.
        """
        num_ranks, num_local = dist.get_world_size(self.group), experts.num_experts
        order = sort_slots(routing.expert_ids, num_ranks * num_local)
        sent_GL = order.tokens_per_expert_E.view(num_ranks, num_local)
        received_GL = torch.empty_like(sent_GL)
        with collective("all-to-all of expert counts"):
            dist.all_to_all_single(received_GL, sent_GL, group=self.group)
            # The split sizes must be known on the host: the one synchronisation of a layer.
            sent, received = torch.stack([sent_GL.sum(1), received_GL.sum(1)]).tolist()

        # The experts would cast to this dtype anyway; before the exchange it may halve the bytes.
        rows_SD = permute(hidden_TD.to(compute_dtype(hidden_TD)), order)
        rows_RD = _all_to_all(rows_SD, sent, received, self.group)
        results_RD = _apply_experts(rows_RD, received_GL, experts)
        results_SD = _all_to_all(results_RD, received, sent, self.group)
        return unpermute(results_SD, routing, order)


def _apply_experts(rows_RD: Tensor, received_GL: Tensor, experts: Experts) -> Tensor:
    """Apply local experts to rows that come grouped by sending rank, then by expert."""
    num_ranks, num_local = received_GL.shape
    local_ids = torch.arange(num_local, device=rows_RD.device).repeat(num_ranks)
    expert_ids_R1 = torch.repeat_interleave(
        local_ids, received_GL.reshape(-1), output_size=rows_RD.shape[0]
    ).unsqueeze(1)
    order = sort_slots(expert_ids_R1, num_local)
    results_RD = experts(permute(rows_RD, order), order.tokens_per_expert_E)
    unweighted = Routing(expert_ids_R1, torch.ones_like(expert_ids_R1), unit_weights=True)
    return unpermute(results_RD, unweighted, order)


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    return cast(Tensor, _AllToAll.apply(rows, sent, received, group))


class _AllToAll(torch.autograd.Function):
    """Uneven exchange of rows; the gradient travels the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad_rows, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    output = rows.new_empty((sum(received), *rows.shape[1:]))
    with collective("all-to-all of tokens"):
        dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output
