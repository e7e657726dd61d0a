"""Feed-forward networks with stacked weights over tokens grouped by expert, expert after expert.

What lies between the two products of an expert are its few rows, which stay in the processor's
cache; over the rows of all experts each step in between would go through main memory. The backward
pass computes the activation anew, so that nothing but what it reads is kept.

Shapes: T rows, R rows of one expert (more in half precision, see `rows_of_group`), D width, F
neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_dist.moe.grouped_linear import GradientSum, Groups, rows_of_group, with_next_rows


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


def can_use_grouped_ffn(
    rows_TD: Tensor, w_in_EFD: Tensor, activation: Callable[[Tensor], Tensor]
) -> bool:
    """Tell whether expert after expert is the faster way: on a CPU, for more than one.

    An activation with weights of its own gets no gradient there, and one that writes into what it
    reads leaves nothing for the backward pass.
    """
    learns = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    suits = rows_TD.device.type == "cpu" and len(w_in_EFD) > 1 and not learns
    return suits and not _writes_in_place(activation)


def _writes_in_place(activation: Callable[[Tensor], Tensor]) -> bool:
    """Try it: any function may, and only some have a name for it."""
    # In inference mode no tensor counts what is written into it.
    with torch.inference_mode(False), torch.no_grad():
        probe = torch.zeros(1)
        activation(probe)
        return probe._version > 0


def grouped_ffn(
    rows_TD: Tensor,
    weights: Mapping[str, Tensor],
    casts: Mapping[str, Tensor],
    activation: Callable[[Tensor], Tensor],
    groups: Groups,
    sums: Mapping[str, GradientSum],
) -> Tensor:
    """Apply each expert to its own rows: (T, D) of their dtype.

    Args:
        rows_TD: grouped by expert.
        weights: by the names of `Experts`; gradients have their dtypes.
        casts: the same in the rows' dtype.
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
        given = (*weights.values(), *(casts[name] for name in plan.names))
        return cast(Tensor, _GroupedFFN.apply(rows_TD, plan, *given))
    return _compute(rows_TD, casts, plan)[0]


def _compute(
    rows_TD: Tensor, weights: Mapping[str, Tensor], plan: _Plan
) -> tuple[Tensor, list[Tensor]]:
    """Give the outputs, and what the activation of each expert reads if that is to be kept."""
    out_TD = rows_TD.new_empty(rows_TD.shape[0], weights["w_out"].shape[1])
    kept: list[Tensor] = []
    for expert, rows in plan.groups.rows():
        group_RD = with_next_rows(rows_TD, rows)
        given = [
            F.linear(group_RD, weights[f"w_{name}"][expert], _bias(weights, name, expert))
            for name in plan.into
        ]
        _multiply(
            plan.inner(given),
            weights["w_out"][expert].t(),
            _bias(weights, "out", expert),
            out_TD,
            rows,
        )
        if plan.keeps:
            kept += given
    return out_TD, kept


def _multiply(
    given_RI: Tensor, weight_IO: Tensor, bias_O: Tensor | None, out_TO: Tensor, rows: slice
) -> None:
    """Write a product into an expert's rows, and into those of the next ones, whose turn comes."""
    stop = rows.start + given_RI.shape[0]
    own_RO = out_TO[rows.start : stop] if stop <= out_TO.shape[0] else None
    if bias_O is None:
        found_RO = torch.mm(given_RI, weight_IO, out=own_RO)
    else:
        found_RO = torch.addmm(bias_O, given_RI, weight_IO, out=own_RO)
    if own_RO is None:
        out_TO[rows] = found_RO[: rows.stop - rows.start]


def _bias(weights: Mapping[str, Tensor], name: str, expert: int) -> Tensor | None:
    bias_EO = weights.get(f"b_{name}")
    return None if bias_EO is None else bias_EO[expert]


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, plan: _Plan, *values: Tensor) -> Tensor:
        casts = dict(zip(plan.names, values[len(plan.names) :], strict=True))
        out_TD, kept = _compute(rows_TD, casts, plan)
        ctx.plan = plan
        ctx.save_for_backward(rows_TD, *values, *kept)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        rows_TD, *saved = ctx.saved_tensors
        num = len(plan.names)
        weights = dict(zip(plan.names, saved[:num], strict=True))
        casts = dict(zip(plan.names, saved[num : 2 * num], strict=True))
        needs_rows, _, *needs_values = ctx.needs_input_grad
        grads = _Gradients(weights, dict(zip(plan.names, needs_values[:num], strict=True)), plan)
        grad_rows_TD = torch.empty_like(rows_TD) if needs_rows else None
        # The gradient of a sum is expanded, which matrix products do not take.
        grad_TD = grad_TD.contiguous()
        kept = iter(saved[2 * num :])
        with torch.autocast(grad_TD.device.type, enabled=False):
            for expert, rows in plan.groups.rows():
                # Zeros where rows are the next expert's, so that these count for nothing.
                grad_RD = rows_of_group(grad_TD, rows)
                given = [next(kept).detach().requires_grad_() for _ in plan.into]
                with torch.enable_grad():
                    inner_RF = plan.inner(given)
                grads.add("out", expert, grad_RD, inner_RF.detach())
                grad_RF = grad_RD @ casts["w_out"][expert]
                into = torch.autograd.grad(inner_RF, given, grad_RF)
                group_RD = with_next_rows(rows_TD, rows)
                for name, own_RF in zip(plan.into, into, strict=True):
                    grads.add(name, expert, own_RF, group_RD)
                if grad_rows_TD is not None:
                    own = [casts[f"w_{name}"][expert] for name in plan.into]
                    _write_sum(into, own, grad_rows_TD, rows)
            return grad_rows_TD, None, *grads.found(), *(None for _ in plan.names)


def _write_sum(
    grads_RF: Sequence[Tensor], weights_FD: Sequence[Tensor], out_TD: Tensor, rows: slice
) -> None:
    """Write the gradient by an expert's rows, the sum over the linear layers that read them."""
    total_RD = torch.mm(grads_RF[0], weights_FD[0])
    for grad_RF, weight_FD in zip(grads_RF[1:], weights_FD[1:], strict=True):
        total_RD.addmm_(grad_RF, weight_FD)
    out_TD[rows] = total_RD[: rows.stop - rows.start]


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
