"""A linear layer that is packed as native blocks are, such as the head of a language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.inference.backends.answers_only import AnswersOnly
from moe_dist.inference.backends.native_blocks import PRECISIONS


class NativeLinear(AnswersOnly):
    """In the place of a linear layer after native blocks, in their precision; gives float32.

    Args:
        weight_OI: its weight.
        bias_O: its bias.
        precision: one of `PRECISIONS`.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, precision: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        # Architectures ask a layer for the dtype of its weight.
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        number = PRECISIONS[precision]
        self._product = torch.classes.moe_dist.Product(weight_OI.float(), bias_O, number)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply it to the last axis."""
        self.check_input(hidden)
        out: Tensor = self._product.apply(hidden)
        return out
