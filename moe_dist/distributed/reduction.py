"""Average gradients that every rank holds whole, without sending what nobody touched.

Half of a small encoder is embeddings, of which a batch touches a few rows: over gloo these zeros
would be most of what a step sends.

Shapes: V rows of a table, D columns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from moe_dist.distributed.parameter_groups import is_expert_slice
from moe_dist.distributed.shared_memory import MAX_RANKS
from moe_dist.distributed.shared_reduction import SharedReduction

logger = logging.getLogger(__name__)

# Smaller matrices are not worth a message of their own.
MIN_TABLE_ROWS = 4096


class Reduction(Protocol):
    """How tensors are added up over a group; every method is collective and works in place."""

    def average(self, tensors: Sequence[Tensor], divisor: int) -> None:
        """Add up each tensor over ranks and divide it by `divisor`."""
        ...

    def maximum(self, tensor: Tensor) -> None:
        """Take the maximum of each element over ranks."""
        ...


class BackendReduction:
    """The backend's own all-reduce.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def average(self, tensors: Sequence[Tensor], divisor: int) -> None:
        """Send all tensors of a dtype in one message."""
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            same = [tensor for tensor in tensors if tensor.dtype is dtype]
            flat = _flatten_dense_tensors(same)
            dist.all_reduce(flat, group=self._group)
            flat.div_(divisor)
            torch._foreach_copy_(same, list(_unflatten_dense_tensors(flat, same)))

    def maximum(self, tensor: Tensor) -> None:
        """Take the maximum of each element over ranks."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)


def reduction_over(group: dist.ProcessGroup, device: torch.device) -> Reduction | None:
    """Return the fastest way to add up tensors of a device over a group; collective.

    None for a group of one rank. Through shared memory where all ranks are processes of one
    machine that train on its CPU, else by the group's backend.
    """
    if dist.get_world_size(group) == 1:
        return None
    shared = SharedReduction.over(group) if device.type == "cpu" else None
    if shared is not None:
        return shared
    if device.type == "cpu" and dist.get_rank() == 0:
        logger.info(
            "gradients go through %s: ranks are of several machines or containers, more than %d, "
            "or have no memory that they could share",
            dist.get_backend(group),
            MAX_RANKS,
        )
    return BackendReduction(group)


def average_gradients(
    parameters: Sequence[nn.Parameter],
    everyone: Reduction | None,
    same_experts: Reduction | None,
) -> None:
    """Add up gradients over ranks and divide them by the number of ranks, in place; collective.

    Args:
        parameters: all with gradients, in the same order on every rank.
        everyone: over all ranks; None where there is one.
        same_experts: over the ranks that hold the same experts; None where that is one, or no
            parameter is a slice of experts. Their gradients have the other ranks' tokens already,
            so they too are divided by the number of all ranks.
    """
    num_ranks = dist.get_world_size()
    experts = [_gradient(p) for p in parameters if is_expert_slice(p)]
    if same_experts is not None:
        same_experts.average(experts, num_ranks)
    elif experts:
        torch._foreach_div_(experts, num_ranks)
    if everyone is None:
        return
    whole: list[Tensor] = []
    packed: list[tuple[Tensor, Tensor, Tensor]] = []
    for gradient in (_gradient(p) for p in parameters if not is_expert_slice(p)):
        rows = _touched_rows(gradient, everyone) if _may_be_sparse(gradient) else None
        if rows is None:
            whole.append(gradient)
        else:
            packed.append((gradient, rows, gradient.index_select(0, rows)))
    everyone.average([*(few for _, _, few in packed), *whole], num_ranks)
    for gradient, rows, few in packed:
        gradient.index_copy_(0, rows, few)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _may_be_sparse(gradient: Tensor) -> bool:
    # On GPUs finding the rows would make the host wait, and links are fast.
    return (
        gradient.device.type == "cpu"
        and gradient.ndim == 2
        and gradient.shape[0] >= MIN_TABLE_ROWS
        and gradient.is_contiguous()
    )


def _touched_rows(grad_VD: Tensor, everyone: Reduction) -> Tensor | None:
    """Find the rows that are not zero on some rank; None where these are most."""
    # Of bytes, since along rows of floats no reduction that sees NaN is a tenth as fast on CPUs.
    live_V = grad_VD.view(torch.uint8).any(dim=1).to(torch.uint8)
    everyone.maximum(live_V)
    rows = live_V.nonzero().squeeze(1)
    return None if 2 * rows.numel() > grad_VD.shape[0] else rows
