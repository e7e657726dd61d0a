"""A case on a device, and what cases share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16")
NUM_EXPERTS = 4
OLDER = " on an older device"
"""Ends the name of a case whose accelerator has no kernel for groups."""


@dataclass(frozen=True)
class Prepared:
    """A case on a device.

    Args:
        forward: gives a scalar.
        leaves: whose gradients are compared, if the scalar has some.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()


Case = Callable[[torch.device], Prepared]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What an engine computes in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def tiny_student(dense: Any, **options: Any) -> Any:
    """Split a tiny BERT into experts whose widths the kernels of accelerators take."""
    from moe_dist.conversion import dense_to_moe, plan_partition

    plan = plan_partition(
        [torch.arange(32.0)] * 2,
        num_experts=NUM_EXPERTS,
        expert_size=8,
        num_shared_neurons=0,
    )
    return dense_to_moe(dense, plan, router="token_gate", **options)
