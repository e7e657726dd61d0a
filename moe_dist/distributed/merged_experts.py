"""Merges of experts that lie on several ranks: each adds its own experts' part.

Shapes: T tokens, G groups (tasks), D model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.distributed.position import collective
from moe_dist.errors import MissingInputError
from moe_dist.moe.experts import Experts
from moe_dist.moe.merge import Merges, TokenGroups, stacked_merges
from moe_dist.moe.merge_gates import TaskMergeGate
from moe_dist.moe.on_device import bring
from moe_dist.moe.routing import RoutingContext


def decide_over_group(
    gate: TaskMergeGate,
    hidden_TD: Tensor,
    context: RoutingContext | None,
    group: dist.ProcessGroup,
) -> Merges:
    """Merge for all tasks that some rank of the group has tokens of; collective.

    In training the context has the step's seed, since all ranks must draw the same noise; without
    one it is a MissingInputError.
    """
    if gate.training and (context is None or context.noise_seed is None):
        raise MissingInputError(
            "merged experts on several ranks need the same noise on all of them, and this forward "
            "call has no seed of it",
            remedy="run the model inside use_samples, with one seed a step for all ranks",
        )
    tasks_B = gate.tasks_of(hidden_TD, context)
    present_N = torch.zeros(gate.num_tasks, dtype=torch.int32, device=hidden_TD.device)
    present_N[bring(tasks_B, hidden_TD.device)] = 1
    with collective("exchange of tasks"):
        dist.all_reduce(present_N, op=dist.ReduceOp.MAX, group=group)
    return gate.for_tasks(present_N.nonzero().flatten(), tasks_B, hidden_TD, context)


def merge_over_group(
    experts: Experts, rows_TD: Tensor, merges: Merges, group: dist.ProcessGroup
) -> Tensor:
    """Apply to each token the merge of all ranks' experts; collective.

    Every rank of the group holds as many consecutive experts, and adds their part of each merge;
    the sum is every rank's. So no token travels, and what does has the size of one dense FFN for
    each task. The (T, D) results are in `compute_dtype` of the rows.
    """
    first = dist.get_rank(group) * experts.num_experts
    parts = stacked_merges(
        dict(experts.named_parameters(recurse=False)), merges, first_expert=first
    )
    whole = {name: _SumOverRanks.apply(part, group) for name, part in parts.items()}
    groups = TokenGroups.of(merges)
    out_TD = experts.with_weights(
        whole, groups.sorted_rows(rows_TD), torch.tensor(groups.sizes, device="cpu")
    )
    return groups.in_order(out_TD)


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks, each of which uses it: so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = part.contiguous().clone()
    with collective("sum of merged experts"):
        dist.all_reduce(total, group=group)
    return total
