"""Feed-forward networks with stacked weights in native operators, where somebody has loaded them.

Between its products an expert's rows stay in the processor's cache, and gradients of weights are
written where they belong. Weights are brought to the rows' dtype while they are packed.

Shapes: T rows, D width, F neurons, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from moe_dist.moe.grouped_linear import GradientSum, Groups

_NATIVE_ACTIVATIONS = {
    F.gelu: 0, F.relu: 2, F.silu: 3, torch.tanh: 4,
    "GELUActivation": 0, "NewGELUActivation": 1, "GELUTanh": 1, "ReLU": 2, "SiLUActivation": 3,
    "SiLU": 3, "Tanh": 4,
}  # fmt: skip
"""Numbers that the C++ code knows activations by: functions, or classes by name."""
_LAYERS = ("in", "gate", "out")
_PRECISIONS = {torch.float32: 0, torch.bfloat16: 1}
"""Numbers that native operators know precisions by."""
_ONE_PART = 1024
"""Rows of an expert that one product makes a gradient of weights of; `kGroup` there."""
_WIDTH = 32
"""What blocks of products divide widths by."""


def native_activation(activation: Any) -> int | None:
    """An activation's number in C++; None where it is not known there.

    Modules are known by their name if they are torch's or transformers' own, without hooks.
    """
    key = activation
    if isinstance(activation, nn.Module):
        home = type(activation).__module__.partition(".")[0]
        hooks = (activation._forward_hooks, activation._forward_pre_hooks)
        if home not in ("torch", "transformers") or any(hooks):
            return None
        key = type(activation).__name__
    return _NATIVE_ACTIVATIONS.get(key) if isinstance(key, Hashable) else None


def can_use_native_experts(
    rows_TD: Tensor,
    weights: Mapping[str, Tensor],
    activation: Callable[[Tensor], Tensor],
    sizes: Sequence[int] | None,
) -> bool:
    """Tell whether operators are loaded that compute these experts, and faster than torch does.

    They are for processors with AVX-512 and no tiles, for more experts than one, and for widths
    that are multiples of 32; for weights in float32, or in the rows' bfloat16 where no expert has
    so many rows that its gradient is added up of several parts.
    """
    stacks = [weight for name, weight in weights.items() if name.startswith("w_")]
    dtypes = {stack.dtype for stack in stacks}
    return (
        rows_TD.device.type == "cpu"
        and len(stacks[0]) > 1
        and sizes is not None
        and (
            dtypes == {torch.float32}
            or (dtypes == {rows_TD.dtype} and max(sizes, default=0) <= _ONE_PART)
        )
        and all(width and width % _WIDTH == 0 for width in weights["w_in"].shape[1:])
        and native_activation(activation) is not None
        and hasattr(torch.ops.moe_dist, "experts")
        and _gains(rows_TD.dtype)
    )


@functools.cache
def _gains(dtype: torch.dtype) -> bool:
    if dtype not in _PRECISIONS:
        return False
    own = torch.ops.moe_dist
    return bool(own.learns_experts() and own.multiplies(_PRECISIONS[dtype]))


@functools.cache
def count_flops() -> None:
    """Let torch's counter of FLOPs know the operators, once they are loaded."""

    def products(rows: Sequence[int], stacks: Sequence[Sequence[int]]) -> int:
        return sum(2 * rows[0] * shape[1] * shape[2] for shape in stacks if len(shape) > 1)

    def forward(rows: Any, sizes: object, weights: Any, *_: Any, **__: Any) -> int:
        return products(rows, weights)

    def backward(
        grad: object, rows: Any, kept: object, sizes: object, weights: Any, activation: int,
        needs_rows: bool, sums: Any, *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        return products(rows, sums) + (products(rows, weights) if needs_rows else 0)

    register_flop_formula(torch.ops.moe_dist.experts)(forward)
    register_flop_formula(torch.ops.moe_dist.experts_backward)(backward)


def native_experts(
    rows_TD: Tensor,
    weights: Mapping[str, Tensor],
    activation: Callable[[Tensor], Tensor],
    groups: Groups,
    sums: Mapping[str, GradientSum],
) -> Tensor:
    """Apply each expert to its own rows: (T, D) of their dtype.

    Args:
        rows_TD: grouped by expert.
        weights: by the names of `Experts`; biases in the rows' dtype, weights in their own.
        activation: one that has a number.
        groups: of the rows.
        sums: by the names of weights, where other products have the same.

    Returns:
        The rows' outputs.
    """
    assert groups.sizes is not None
    number = native_activation(activation)
    given = (rows_TD, *weights.values())
    if torch.is_grad_enabled() and any(one.requires_grad for one in given):
        names = tuple(weights)
        return cast(Tensor, _NativeExperts.apply(rows_TD, names, groups, number, sums, *given[1:]))
    return _forward(rows_TD, weights, groups, number, keeps=False)[0]


def _forward(
    rows_TD: Tensor,
    weights: Mapping[str, Tensor],
    groups: Groups,
    number: int | None,
    *,
    keeps: bool,
) -> list[Tensor]:
    sides = [_of_layers(weights, kind, rows_TD) for kind in ("w", "b")]
    found = torch.ops.moe_dist.experts(rows_TD.contiguous(), groups.sizes, *sides, number, keeps)
    return cast(list[Tensor], found)


def _of_layers(weights: Mapping[str, Tensor], kind: str, like: Tensor) -> list[Tensor]:
    """Give what there is for each layer, and an empty tensor where there is nothing."""
    found = [weights.get(f"{kind}_{layer}") for layer in _LAYERS]
    return [like.new_empty(0) if one is None else one.detach().contiguous() for one in found]


class _NativeExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_TD: Tensor,
        names: tuple[str, ...],
        groups: Groups,
        number: int,
        sums: Mapping[str, GradientSum],
        *values: Tensor,
    ) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        out_TD, *kept = _forward(rows_TD, weights, groups, number, keeps=True)
        ctx.names, ctx.groups, ctx.number, ctx.sums = names, groups, number, sums
        ctx.save_for_backward(rows_TD, *values, *kept)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_TD, *saved = ctx.saved_tensors
        weights = dict(zip(ctx.names, saved, strict=False))
        needs_rows, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        wanted = [name for name, needed in zip(ctx.names, needs, strict=True) if needed]
        sums = {n: ctx.sums.get(n) or GradientSum() for n in wanted if n.startswith("w_")}
        # In float32, since each of many groups of rows adds to them.
        found = {
            n: torch.zeros(weights[n].shape, dtype=torch.float32)
            for n in wanted
            if n.startswith("b_")
        }
        experts = [expert for expert, _ in ctx.groups.rows()]
        opened = {name: one.open(weights[name], experts) for name, one in sums.items()}
        none_begun = [False] * len(weights["w_in"])
        begun: list[bool] = []
        for layer in _LAYERS:
            begun += opened[f"w_{layer}"][1] if f"w_{layer}" in opened else none_begun
        grad_rows_TD = torch.ops.moe_dist.experts_backward(
            *(grad_TD.contiguous(), rows_TD.contiguous(), saved[len(weights) :]),
            *(ctx.groups.sizes, _of_layers(weights, "w", rows_TD), ctx.number, needs_rows),
            _of_layers({name: buffer for name, (buffer, _) in opened.items()}, "w", rows_TD),
            *(_of_layers(found, "b", rows_TD), begun),
        )
        grads: dict[str, Tensor | None] = {n: one.to(weights[n].dtype) for n, one in found.items()}
        grads |= {name: one.end_product(weights[name]) for name, one in sums.items()}
        own = (grads.get(name) for name in ctx.names)
        return (grad_rows_TD if needs_rows else None, *[None] * 4, *own)
