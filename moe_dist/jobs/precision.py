"""The precision that a job computes in, and what is faster in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moe_dist.conversion.families import half_fault
from moe_dist.conversion.half_attention import half_attention
from moe_dist.conversion.half_blocks import half_blocks
from moe_dist.distributed.update import Precision, precision_context
from moe_dist.inference.backends.native import load_operators
from moe_dist.training.hardware import pick_own_precision, pick_precision


def model_precision(precision: str, device: torch.device, model: nn.Module) -> Precision:
    """Turn `train.precision` into what a model's steps are computed in; collective.

    See `pick_precision`; a family that cannot compute in bf16 has fp32.
    """
    return pick_precision(precision, device, half_fault(model))


def own_precision(precision: str, device: torch.device, model: nn.Module) -> Precision:
    """Do the same for what this process computes alone (`pick_own_precision`); not collective."""
    return pick_own_precision(precision, device, half_fault(model))


@contextmanager
def quick_passes(precision: Precision, device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Let models compute what is slow on a CPU by other means, inside the block.

    Native operators are loaded, and compiled where a machine has none yet: experts use them in
    fp32, too.
    """
    if device.type == "cpu":
        load_operators()
    with half_attention(), half_blocks(*models):
        yield


@contextmanager
def computing_in(precision: Precision, device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Compute passes over whole models, with their gradients, in a precision."""
    with quick_passes(precision, device, *models), precision_context(precision, device):
        yield
