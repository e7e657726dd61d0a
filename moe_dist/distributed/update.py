"""The parts of one optimizer update that every engine shares: precision, rates, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from moe_dist.errors import TrainingError

Precision = Literal["fp32", "bf16"]


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return autocast for bf16 over fp32 weights, or a context that does nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to this share of its `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def current_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Return the learning rate of what is not a routed expert, or of all if nothing else is."""
    dense = [g for g in optimizer.param_groups if g.get("name") == "dense"]
    chosen = dense or optimizer.param_groups
    return float(chosen[0]["base_lr"]) * factor if chosen else 0.0


def fill_missing_gradients(parameters: list[nn.Parameter]) -> None:
    """Give a zero gradient to parameters that the loss did not reach.

    DeepSpeed does so; one process must treat them alike (decay and moments go on).
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def checked_norm(norm: float, step: int) -> float:
    """Give a finite gradient norm back; a TrainingError refuses any other."""
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient norm became {norm} at step {step + 1}; the update was not applied",
            remedy="continue from the last checkpoint with a lower train.learning_rate, more "
            "warm-up, or train.precision=fp32",
        )
    return norm


@contextmanager
def clipped(
    optimizer: torch.optim.Optimizer, gradients: list[Tensor], norm: float, max_norm: float
) -> Iterator[None]:
    """Let an optimizer's step inside the block see gradients that are clipped by their global norm.

    A fused step divides them while it has them: to scale them first is to read and write all once
    more. A `max_norm` of 0 clips nothing.
    """
    if not optimizer.param_groups[0].get("fused"):
        scale_gradients(gradients, norm, max_norm)
        yield
        return
    if max_norm > 0 and norm > max_norm:
        scale = torch.tensor((norm + 1e-6) / max_norm, device=gradients[0].device)
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
    try:
        yield
    finally:
        vars(optimizer).pop("grad_scale", None)


def scale_gradients(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Clip gradients in place by their global norm; a `max_norm` of 0 clips nothing."""
    if max_norm > 0 and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
