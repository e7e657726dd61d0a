"""What a frozen model needs to be asked about every batch of a training on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from moe_dist.conversion.families import known_family
from moe_dist.inference.backends.encoder import BLOCKS, install_native_layers
from moe_dist.inference.backends.native import load_operators
from moe_dist.inference.backends.native_blocks import (
    PRECISIONS,
    UnsuitedError,
    copy_sharing_weights,
)


def quick_teacher(teacher: nn.Module, precision: str) -> nn.Module:
    """Copy a frozen dense encoder so that each of its layers is one native call.

    Its answers and hidden states are the same but for rounding: products are in the precision, and
    what is carried from layer to layer is float32. Queries and keys cannot be read out of it.

    Args:
        teacher: frozen, on the CPU.
        precision: of products, one of `PRECISIONS`.

    Returns:
        The copy, which shares what is not in a layer.

    Raises:
        UnsuitedError: if it has no such form, or this machine no such products.
    """
    family = known_family(teacher)
    if family is None or family.model_type not in BLOCKS:
        raise UnsuitedError(f"only {', '.join(BLOCKS)} have it")
    if not load_operators() or not torch.ops.moe_dist.multiplies(PRECISIONS[precision]):
        raise UnsuitedError(f"there is no native product in {precision} here")
    quick: Any = copy_sharing_weights(teacher)
    install_native_layers(quick, family, precision)
    return cast(nn.Module, quick.eval())
