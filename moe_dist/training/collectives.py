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
    """Return how many processes train together.

    Returns:
        1 without a process group.
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Return this process's place among them.

    Returns:
        0 without a process group.
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor over all ranks, in place.

    Args:
        tensor: of equal shape on every rank.

    Returns:
        The same tensor.
    """
    if num_ranks() > 1:
        with collective("sum over ranks"):
            dist.all_reduce(tensor)
    return tensor


def max_over_ranks(value: int, device: torch.device) -> int:
    """Find the largest of the ranks' values.

    Args:
        value: this rank's.
        device: where the backend communicates.

    Returns:
        The largest.
    """
    if num_ranks() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    with collective("maximum over ranks"):
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def gather_values(value: Any) -> list[Any]:
    """Give every rank the values of all, for error messages and the like.

    Args:
        value: this rank's, small and picklable.

    Returns:
        One value for each rank.
    """
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
