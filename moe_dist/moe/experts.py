"""The experts of one layer: small FFNs whose weights are stacked.

Shapes: T tokens, D model, F neurons of one expert, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.moe.grouped_ffn import can_use_grouped_ffn, grouped_ffn
from moe_dist.moe.grouped_linear import (
    GradientSum,
    can_use_grouped_mm,
    group_rows,
    grouped_linear,
)
from moe_dist.moe.native_experts import can_use_native_experts, native_experts
from moe_dist.moe.on_device import bring

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Tell the dtype a linear layer would compute in: autocast's where it is on, else the input's.

    Autocast does not reach grouped products, so the layer casts by itself.
    """
    device_type = hidden.device.type
    if hidden.dtype is not torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


@dataclass
class _Weight:
    """Stacked weights, the dtype of the computation, and where gradients add up."""

    value: Tensor
    dtype: torch.dtype
    gradient: GradientSum | None = None

    @cached_property
    def cast(self) -> Tensor:
        """The same in the dtype of the computation; native operators cast stacks by themselves."""
        return _cast(self.value, self.dtype)


class Experts(nn.Module):
    """E feed-forward networks with stacked weights, over tokens grouped by expert.

    Parameter names and shapes are what checkpoints hold: w_in (E, F, D), b_in (E, F),
    w_gate (E, F, D) and b_gate (E, F) if gated, w_out (E, D, F), b_out (E, D). With expert_size 0
    only b_out is left.

    Args:
        num_experts: E.
        d_model: D.
        expert_size: F, neurons of one expert; may be 0.
        activation: a name in `ACTIVATIONS`, or any function on tensors.
        gated: multiply the activated gate projection with w_in's, as in gated T5.
        bias_in: whether w_in (and w_gate) have biases.
        bias_out: whether w_out has a bias.
        dropout: probability, after the activation.

    Raises:
        ValueError: if the activation's name is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        expert_size: int,
        *,
        activation: Callable[[Tensor], Tensor] | str,
        gated: bool = False,
        bias_in: bool = True,
        bias_out: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}; "
                "pass the function itself"
            )
        self.num_experts = num_experts
        self.d_model = d_model
        self.expert_size = expert_size
        self.gated = gated
        self.dropout = dropout
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        has_neurons = expert_size > 0
        into, out_of = (
            (num_experts, expert_size, d_model),
            (num_experts, d_model, expert_size),
        )
        self.w_in = _parameter(into, has_neurons)
        self.b_in = _parameter(into[:2], has_neurons and bias_in)
        self.w_gate = _parameter(into, has_neurons and gated)
        self.b_gate = _parameter(into[:2], has_neurons and gated and bias_in)
        self.w_out = _parameter(out_of, has_neurons)
        self.b_out = _parameter(out_of[:2], bias_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start every expert on its own, as `nn.Linear` would."""
        for name, parameter in self.named_parameters(recurse=False):
            fan_in = self.expert_size if name.endswith("_out") else self.d_model
            bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, sorted_TD: Tensor, tokens_per_expert_E: Tensor | None = None) -> Tensor:
        """Apply each expert to its own tokens, in `compute_dtype` of the input.

        The rows are grouped by expert, expert 0 first. Only one expert can do without their
        counts, else they are a ValueError.
        """
        if tokens_per_expert_E is None:
            if self.num_experts > 1:
                raise ValueError(f"{self.num_experts} experts need tokens_per_expert_E")
            tokens_per_expert_E = torch.tensor([sorted_TD.shape[0]])
        return self.in_chunks(compute_dtype(sorted_TD))(sorted_TD, tokens_per_expert_E)

    def in_chunks(
        self, dtype: torch.dtype, num_chunks: int = 1
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Give a function like `forward`, to be called `num_chunks` times on parts of one batch.

        The weights are cast once, and their gradients are added up in one buffer. All parts must
        end up in one output, or the gradient is never complete.
        """
        weights = {
            name: _Weight(
                parameter,
                dtype,
                GradientSum(num_chunks) if num_chunks > 1 else None,
            )
            for name, parameter in self.named_parameters(recurse=False)
        }
        for name, weight in weights.items():
            if name.startswith("b_"):
                weight.cast  # noqa: B018  # a part of the graph, whichever part asks first
        return partial(self._compute, weights, dtype)

    def with_weights(
        self, weights: Mapping[str, Tensor], sorted_TD: Tensor, tokens_per_expert_E: Tensor
    ) -> Tensor:
        """Compute like `forward`, with other stacked weights of any number in place of its own."""
        dtype = compute_dtype(sorted_TD)
        given = {name: _Weight(value, dtype) for name, value in weights.items()}
        return self._compute(given, dtype, sorted_TD, tokens_per_expert_E)

    def _compute(
        self,
        weights: dict[str, _Weight],
        dtype: torch.dtype,
        sorted_TD: Tensor,
        tokens_per_expert_E: Tensor,
    ) -> Tensor:
        rows_TD = sorted_TD.to(dtype)
        w_in = weights.get("w_in")
        if w_in is None:
            return _bias_only(rows_TD, weights.get("b_out"), tokens_per_expert_E)
        on_device = len(w_in.value) > 1 and can_use_grouped_mm(rows_TD, w_in.value)
        groups = group_rows(tokens_per_expert_E, rows_TD, on_device=on_device)
        is_fixed = not on_device and not (self.dropout and self.training)
        if is_fixed and can_use_grouped_ffn(rows_TD, w_in.value, self.activation):
            # Casting a bias is a part of the graph, see `_cast`.
            values = {
                n: one.value if n.startswith("w_") else one.cast for n, one in weights.items()
            }
            sums = {name: one.gradient for name, one in weights.items() if one.gradient is not None}
            if can_use_native_experts(rows_TD, values, self.activation, groups.sizes):
                return native_experts(rows_TD, values, self.activation, groups, sums)
            casts = {name: weight.cast for name, weight in weights.items()}
            return grouped_ffn(rows_TD, values, casts, self.activation, groups, sums)

        def linear(rows: Tensor, suffix: str) -> Tensor:
            weight, bias = weights[f"w_{suffix}"], weights.get(f"b_{suffix}")
            bias_value = None if bias is None else bias.cast
            return grouped_linear(
                rows, weight.value, bias_value, groups, weight.gradient, weight.cast
            )

        hidden_TF = linear(rows_TD, "in")
        if "w_gate" in weights:
            hidden_TF = self.activation(linear(rows_TD, "gate")) * hidden_TF
        else:
            hidden_TF = self.activation(hidden_TF)
        if self.dropout:
            hidden_TF = F.dropout(hidden_TF, self.dropout, self.training)
        return linear(hidden_TF, "out")

    def extra_repr(self) -> str:
        """Describe the sizes for `print(module)`."""
        return (
            f"num_experts={self.num_experts}, d_model={self.d_model}, "
            f"expert_size={self.expert_size}, gated={self.gated}, dropout={self.dropout}"
        )


def _parameter(shape: tuple[int, ...], present: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if present else None


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring weights to a dtype; products of stacks take their gradients to the weights' own."""
    return weight.to(dtype) if weight.dim() < 3 else weight.detach().to(dtype)


def _bias_only(rows_TD: Tensor, b_out: _Weight | None, tokens_per_expert_E: Tensor) -> Tensor:
    if b_out is None:
        return torch.zeros_like(rows_TD)
    b_out_ED = b_out.cast
    counts_E = bring(tokens_per_expert_E, rows_TD.device)
    experts_E = torch.arange(b_out_ED.shape[0], device=rows_TD.device)
    expert_of_row_T = torch.repeat_interleave(experts_E, counts_E, output_size=rows_TD.shape[0])
    return F.embedding(expert_of_row_T, b_out_ED)
