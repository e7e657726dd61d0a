"""Average gradients that every rank holds whole, without sending what nobody touched.

Half of a small encoder is embeddings, of which a batch touches a few rows: over gloo these zeros
would be most of what a step sends.

Shapes: V rows of a table, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from moe_dist.distributed.parameter_groups import is_expert_slice

# Smaller matrices are not worth a message of their own.
MIN_TABLE_ROWS = 4096


def average_gradients(
    parameters: Sequence[nn.Parameter], expert_data_group: dist.ProcessGroup | None
) -> None:
    """Add up gradients over ranks and divide them by the number of ranks, in place; collective.

    Args:
        parameters: all with gradients, in the same order on every rank.
        expert_data_group: the ranks that hold the same experts; None where no parameter is a slice
            of experts. Their gradients have the other ranks' tokens already, so they too are
            divided by the number of all ranks.
    """
    num_ranks = dist.get_world_size()
    whole: list[Tensor] = []
    experts: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        if is_expert_slice(parameter):
            experts.append(gradient)
        elif _may_be_sparse(gradient):
            _average_rows(gradient, num_ranks)
        else:
            whole.append(gradient)
    _average_all(whole, num_ranks, None)
    if expert_data_group is not None and dist.get_world_size(expert_data_group) > 1:
        _average_all(experts, num_ranks, expert_data_group)
    elif experts:
        torch._foreach_div_(experts, num_ranks)


def _may_be_sparse(gradient: Tensor) -> bool:
    # On GPUs finding the rows would make the host wait, and links are fast.
    return (
        gradient.device.type == "cpu"
        and gradient.ndim == 2
        and gradient.shape[0] >= MIN_TABLE_ROWS
        and gradient.is_contiguous()
    )


def _average_rows(grad_VD: Tensor, num_ranks: int) -> None:
    """Send only rows that are not zero on some rank, unless that is most of them."""
    # Of bytes, since reductions of floats along rows that miss no NaN take 15 times as long on CPUs.
    live_V = grad_VD.view(torch.uint8).any(dim=1).to(torch.uint8)
    dist.all_reduce(live_V, op=dist.ReduceOp.MAX)
    rows = live_V.nonzero().squeeze(1)
    if 2 * rows.numel() > grad_VD.shape[0]:
        dist.all_reduce(grad_VD)
        grad_VD.div_(num_ranks)
        return
    packed = grad_VD.index_select(0, rows)
    dist.all_reduce(packed)
    grad_VD.index_copy_(0, rows, packed.div_(num_ranks))


def _average_all(
    gradients: Sequence[Tensor], num_ranks: int, group: dist.ProcessGroup | None
) -> None:
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        same = [gradient for gradient in gradients if gradient.dtype is dtype]
        flat = _flatten_dense_tensors(same)
        dist.all_reduce(flat, group=group)
        flat.div_(num_ranks)
        torch._foreach_copy_(same, list(_unflatten_dense_tensors(flat, same)))
