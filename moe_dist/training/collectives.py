"""Reductions over ranks that do nothing where there is only one process.

Collectives here take tensors on the device of the process group's backend: NCCL knows no CPU
tensors, gloo takes them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from moe_dist.distributed.position import collective


def num_ranks() -> int:
    """Return how many processes train together: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Return this process's place among them: 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor, of equal shape on every rank, over all ranks, in place."""
    if num_ranks() > 1:
        with collective("sum over ranks"):
            dist.all_reduce(tensor)
    return tensor


def max_over_ranks(value: int, device: torch.device) -> int:
    """Find the largest of the ranks' values; `device` is where the backend communicates."""
    if num_ranks() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    with collective("maximum over ranks"):
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def gather_rows(rows: Tensor) -> Tensor:
    """Join the rows of all ranks, of which each may have another number, in the ranks' order.

    With their graph: what rows get is the sum of the gradients on all ranks.
    """
    if num_ranks() == 1:
        return rows
    counts = torch.zeros(num_ranks(), dtype=torch.int64, device=rows.device)
    counts[own_rank()] = len(rows)
    of_ranks = sum_over_ranks(counts).tolist()
    parts = [rows.new_zeros(count, *rows.shape[1:]) for count in of_ranks]
    parts[own_rank()] = rows
    joined: Tensor = _Sum.apply(torch.cat(parts))
    return joined


class _Sum(torch.autograd.Function):
    """A sum over ranks whose gradient is one, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].clone())


def gather_values(value: Any) -> list[Any]:
    """Give every rank the (small, picklable) values of all, for error messages and the like."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    with collective("gathering of values"):
        dist.all_gather_object(values, value)
    return values


def wait_for_ranks() -> None:
    """Wait until every rank is here."""
    if num_ranks() > 1:
        with collective("barrier"):
            dist.barrier()
