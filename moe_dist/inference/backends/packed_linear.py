"""A linear layer whose weight was laid out for the processor once, when the model was loaded.

Shapes: T rows, I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.inference.backends.answers_only import AnswersOnly
from moe_dist.moe.grouped_linear import rows_of_group


def pack_weight(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay a weight out as oneDNN wants it, in bfloat16.

    Eager torch works that out anew in each call, which is most of the time where rows are few. In
    float32 nothing is gained by it, and processors without AVX-512 cannot: the weight is then only
    made contiguous.
    """
    own_OI = weight_OI.detach().to(dtype).contiguous()
    if dtype is not torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return own_OI.clone() if own_OI.data_ptr() == weight_OI.data_ptr() else own_OI
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(own_OI)
    return packed


def round_rows(rows_TI: Tensor) -> Tensor:
    """Fill up to a round number of rows, see `rows_of_group`; one row stays alone."""
    num_rows = rows_TI.shape[0]
    return rows_of_group(rows_TI, slice(0, num_rows)) if num_rows > 1 else rows_TI


def multiply_packed(rows_TI: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    """Apply a linear layer to rows, whose number should be a round one in bfloat16: (T, O)."""
    if not weight.is_mkldnn:
        with torch.autocast("cpu", enabled=False):
            return F.linear(rows_TI, weight, bias_O)
    out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(rows_TI, weight, bias_O, "none", [], "")
    return out_TO


class PackedLinear(AnswersOnly):
    """In the place of an `nn.Linear`, or of GPT-2's Conv1D, that learns no more.

    Args:
        weight_OI: its weight.
        bias_O: its bias.
        dtype: to compute in.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        # Architectures ask a layer for the dtype of its weight.
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self._packed = pack_weight(weight_OI, dtype)
        self._bias_O = None if bias_O is None else bias_O.detach().to(dtype, copy=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply it to the last axis."""
        self.check_input(hidden)
        rows_TI = hidden.reshape(-1, self.in_features).to(self.weight.dtype)
        out_TO = multiply_packed(round_rows(rows_TI), self._packed, self._bias_O)
        return out_TO[: rows_TI.shape[0]].view(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer for `print(module)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
