"""The model as it was trained, in another precision if asked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from moe_dist.moe.layer import MoELayer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Eager:
    """Plain torch; weights are of the precision, so that none is cast in a call."""

    precisions = tuple(DTYPES)
    is_quick = True

    def prepare(self, model: Any, precision: str) -> Any:
        """Copy the model and cast its weights, those of routers apart."""
        own = copy.deepcopy(model).eval().requires_grad_(False)
        routers = [module.router for module in own.modules() if isinstance(module, MoELayer)]
        cast_weights(
            own, DTYPES[precision], apart=nn.ModuleList(r for r in routers if r is not None)
        )
        return own


def cast_weights(model: nn.Module, dtype: torch.dtype, *, apart: nn.Module) -> None:
    """Cast a model's parameters in place: routers are to choose alike, so theirs stay.

    Buffers stay too: frequencies of rotary positions lose their meaning in half precision.
    """
    kept = {id(parameter) for parameter in apart.parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
