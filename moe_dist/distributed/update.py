"""The parts of one optimizer update that every engine shares: precision, rates, clipping."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from moe_dist.errors import TrainingError

Precision = Literal["fp32", "bf16"]


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context that computes in a precision over fp32 weights.

    Args:
        precision: "fp32" or "bf16".
        device: where the model is.

    Returns:
        Autocast, or a context that does nothing.
    """
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate.

    Args:
        optimizer: with `base_lr` in its groups.
        factor: share of the base rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def current_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Return the learning rate of what is not a routed expert, or of all if nothing else is.

    Args:
        optimizer: with `base_lr` in its groups.
        factor: share of the base rate.

    Returns:
        The rate.
    """
    dense = [g for g in optimizer.param_groups if g.get("name") == "dense"]
    chosen = dense or optimizer.param_groups
    return float(chosen[0]["base_lr"]) * factor if chosen else 0.0


def fill_missing_gradients(parameters: list[nn.Parameter]) -> None:
    """Give a zero gradient to parameters that the loss did not reach.

    DeepSpeed does so; one process must treat them alike (decay and moments go on).

    Args:
        parameters: those that the optimizer holds.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def checked_norm(norm: float, step: int) -> float:
    """Refuse an update whose gradients are not finite.

    Args:
        norm: the global gradient norm.
        step: optimizer steps done before this one.

    Returns:
        The norm.

    Raises:
        TrainingError: if it is NaN or infinite.
    """
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient norm became {norm} at step {step + 1}; the update was not applied",
            remedy="continue from the last checkpoint with a lower train.learning_rate, more "
            "warm-up, or train.precision=fp32",
        )
    return norm


def scale_gradients(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Clip gradients by their global norm.

    Args:
        gradients: changed in place.
        norm: their global norm.
        max_norm: 0 for no clipping.
    """
    if max_norm > 0 and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
