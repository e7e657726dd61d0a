"""What a layer asks of its device without keeping the host waiting.

An accelerator works on while the host queues more for it. A read of a value, a shape that depends
on values, or a copy that blocks empties the queue, in every layer anew.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def count_ids(ids_N: Tensor, num_ids: int) -> Tensor:
    """Count how often each of the ids 0 to `num_ids` - 1 occurs: (num_ids,) int64."""
    if ids_N.device.type == "cpu":
        return torch.bincount(ids_N, minlength=num_ids)
    # An accelerator's bincount reads the largest id back, to know the result's size.
    return ids_N.new_zeros(num_ids).scatter_add_(0, ids_N, torch.ones_like(ids_N))


def bring(values: Tensor, device: torch.device) -> Tensor:
    """Bring a small tensor to a device; the host waits for none but itself.

    What is on the host is copied there by the driver at once, so it may change afterwards.
    """
    return values.to(device, non_blocking=values.device.type == "cpu")


@cache
def has_grouped_products(device: torch.device) -> bool:
    """Tell whether torch multiplies groups in one kernel there: bf16 on Hopper and Blackwell.

    Elsewhere its `grouped_mm` copies the groups' sizes to the host and loops over them, as our own
    loop does, which fuses the bias. Source: GroupedBlas.cpp of torch 2.13.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
