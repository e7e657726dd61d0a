"""Feed-forward networks with stacked weights over tokens grouped by expert, expert after expert.

What lies between the two products of an expert are its few rows, which stay in the processor's
cache; over the rows of all experts each step in between would go through main memory. The backward
pass computes the activation anew, so that nothing but what it reads is kept.

Shapes: T rows, R rows of one expert (more in half precision, see `rows_of_group`), D width, F
neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_dist.moe.grouped_linear import GradientSum, Groups, multiply_rows, rows_of_group


@dataclass(frozen=True)
class _Plan:
    """What of a call is no tensor.

    Args:
        names: of the weights and biases, in their order.
        activation: between the products.
        groups: rows of each expert, known to the host.
        sums: where gradients of weights are added up, by name.
        keeps: whether there will be a backward pass.
        into: linear layers that read a token; the second one is a gate, which is activated.
    """

    names: tuple[str, ...]
    activation: Callable[[Tensor], Tensor]
    groups: Groups
    sums: Mapping[str, GradientSum]
    keeps: bool
    into: tuple[str, ...]

    def inner(self, given: list[Tensor]) -> Tensor:
        """What the second product reads: (R, F)."""
        if len(given) == 1:
            return self.activation(given[0])
        return self.activation(given[1]) * given[0]


def can_use_grouped_ffn(rows_TD: Tensor, w_in_EFD: Tensor, activation: object) -> bool:
    """Tell whether expert after expert is the faster way: on a CPU, for more than one.

    An activation with weights of its own gets no gradient there.
    """
    learns = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    return rows_TD.device.type == "cpu" and len(w_in_EFD) > 1 and not learns


def grouped_ffn(
    rows_TD: Tensor,
    weights: Mapping[str, Tensor],
    activation: Callable[[Tensor], Tensor],
    groups: Groups,
    sums: Mapping[str, GradientSum],
) -> Tensor:
    """Apply each expert to its own rows, of the weights' dtype: (T, D).

    Args:
        rows_TD: grouped by expert.
        weights: by the names of `Experts`.
        activation: elementwise.
        groups: of the rows.
        sums: by the names of weights, where other products have the same.

    Returns:
        The rows' outputs.
    """
    given = (rows_TD, *weights.values())
    keeps = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    into = tuple(name for name in ("in", "gate") if f"w_{name}" in weights)
    plan = _Plan(tuple(weights), activation, groups, sums, keeps, into)
    if keeps:
        return cast(Tensor, _GroupedFFN.apply(rows_TD, plan, *weights.values()))
    return _compute(rows_TD, weights, plan)[0]


def _compute(
    rows_TD: Tensor, weights: Mapping[str, Tensor], plan: _Plan
) -> tuple[Tensor, list[Tensor]]:
    """Give the outputs, and what the activation of each expert reads if that is to be kept."""
    out_TD = rows_TD.new_empty(rows_TD.shape[0], weights["w_out"].shape[1])
    kept: list[Tensor] = []
    for expert, rows in plan.groups.rows():
        group_RD = rows_of_group(rows_TD, rows)
        given = [
            F.linear(group_RD, weights[f"w_{name}"][expert], _bias(weights, name, expert))
            for name in plan.into
        ]
        multiply_rows(
            plan.inner(given),
            weights["w_out"][expert].t(),
            _bias(weights, "out", expert),
            out_TD[rows],
            slice(None),
        )
        if plan.keeps:
            kept += given
    return out_TD, kept


def _bias(weights: Mapping[str, Tensor], name: str, expert: int) -> Tensor | None:
    bias_EO = weights.get(f"b_{name}")
    return None if bias_EO is None else bias_EO[expert]


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, plan: _Plan, *values: Tensor) -> Tensor:
        out_TD, kept = _compute(rows_TD, dict(zip(plan.names, values, strict=True)), plan)
        ctx.plan = plan
        ctx.save_for_backward(rows_TD, *values, *kept)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        rows_TD, *saved = ctx.saved_tensors
        values, kept = saved[: len(plan.names)], saved[len(plan.names) :]
        weights = dict(zip(plan.names, values, strict=True))
        needs_rows, _, *needs_values = ctx.needs_input_grad
        needs = dict(zip(plan.names, needs_values, strict=True))
        grads = _Gradients(weights, needs, plan)
        grad_rows_TD = torch.empty_like(rows_TD) if needs_rows else None
        # The gradient of a sum is expanded, which matrix products do not take.
        grad_TD = grad_TD.contiguous()
        parts = iter(kept)
        with torch.autocast(grad_TD.device.type, enabled=False):
            for expert, rows in plan.groups.rows():
                grad_RD = rows_of_group(grad_TD, rows)
                given = [next(parts).detach().requires_grad_() for _ in plan.into]
                with torch.enable_grad():
                    inner_RF = plan.inner(given)
                grads.add("out", expert, grad_RD, inner_RF.detach())
                inner_grads = torch.autograd.grad(
                    inner_RF, given, grad_RD @ weights["w_out"][expert]
                )
                group_RD = rows_of_group(rows_TD, rows)
                for name, grad_RF in zip(plan.into, inner_grads, strict=True):
                    grads.add(name, expert, grad_RF, group_RD)
                if grad_rows_TD is not None:
                    grad_rows_TD[rows] = _back(inner_grads, plan, weights, expert)[
                        : rows.stop - rows.start
                    ]
            return grad_rows_TD, None, *grads.found()


def _back(
    grads_RF: tuple[Tensor, ...], plan: _Plan, weights: Mapping[str, Tensor], expert: int
) -> Tensor:
    """The gradient by an expert's rows: (R, D)."""
    first, *others = plan.into
    grad_RD = grads_RF[0] @ weights[f"w_{first}"][expert]
    for name, grad_RF in zip(others, grads_RF[1:], strict=True):
        grad_RD.addmm_(grad_RF, weights[f"w_{name}"][expert])
    return grad_RD


class _Gradients:
    """Gradients of the stacked weights and biases that want one, filled expert by expert."""

    def __init__(
        self, weights: Mapping[str, Tensor], needs: Mapping[str, bool], plan: _Plan
    ) -> None:
        self._weights = weights
        self._sums = {
            name: plan.sums.get(name) or GradientSum()
            for name, needed in needs.items()
            if needed and name.startswith("w_")
        }
        self._biases = {
            name: torch.zeros_like(weights[name])
            for name, needed in needs.items()
            if needed and name.startswith("b_")
        }

    def add(self, layer: str, expert: int, grad_RO: Tensor, rows_RI: Tensor) -> None:
        """Add what one expert's rows give for a linear layer."""
        weight, bias = f"w_{layer}", f"b_{layer}"
        if weight in self._sums:
            self._sums[weight].add_group(expert, grad_RO, rows_RI, self._weights[weight])
        if bias in self._biases:
            torch.sum(grad_RO, dim=0, out=self._biases[bias][expert])

    def found(self) -> list[Tensor | None]:
        """All of them in the order of the weights; None of one that is not wanted or not whole."""
        return [
            self._sums[name].end_product(weight) if name in self._sums else self._biases.get(name)
            for name, weight in self._weights.items()
        ]
