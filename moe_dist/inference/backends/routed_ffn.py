"""A routed feed-forward network that only answers: nothing recorded, no graph, weights packed.

Shapes: T tokens, D model, F neurons of one expert, E experts, K active experts, S slots (a token
and one of its experts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.inference.backends.answers_only import AnswersOnly
from moe_dist.inference.backends.native import load_operators
from moe_dist.inference.backends.packed_linear import multiply_packed, pack_weight, round_rows
from moe_dist.moe.dispatch import permute, sort_slots, unpermute
from moe_dist.moe.experts import Experts
from moe_dist.moe.gates import TokenGate
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.native_experts import native_activation
from moe_dist.moe.routing import Routing, current_context


class RoutedFFN(AnswersOnly):
    """In the place of a `MoELayer`, with the same output.

    Args:
        layer: that it is made of.
        dtype: to compute in; routers decide in their own.
    """

    def __init__(self, layer: MoELayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = layer.name
        self._dtype = dtype
        self.router = layer.router
        self._experts = _PackedExperts.of(layer.experts, dtype)
        self._shared = None if layer.shared is None else _PackedExperts.of(layer.shared, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply shared neurons and the chosen experts to every token, as the layer does."""
        self.check_input(hidden)
        hidden_TD = hidden.reshape(-1, hidden.shape[-1]).to(self._dtype)
        if self.router is None:
            out_TD = self._experts.apply_one(hidden_TD)
        else:
            out_TD = self._experts.apply(hidden_TD, self._choose(self.router, hidden_TD))
        if self._shared is not None:
            out_TD = out_TD + self._shared.apply_one(hidden_TD)
        return out_TD.view(hidden.shape)

    def _choose(self, router: nn.Module, hidden_TD: Tensor) -> Routing:
        if not takes_the_best(router):
            routing: Routing = router(hidden_TD, current_context())
            return routing
        weight_ED = cast(TokenGate, router).gate.weight
        with torch.autocast("cpu", enabled=False):
            scores_TE = F.linear(hidden_TD.to(weight_ED.dtype), weight_ED)
        best_TK = scores_TE.argmax(dim=1, keepdim=True)
        return Routing(best_TK, scores_TE[:, :1], unit_weights=True)


def reads_hidden_states_only(router: nn.Module | None) -> bool:
    """Whether a router needs no context: no token ids, masks or tasks."""
    return router is None or type(router) is TokenGate


def takes_the_best(router: nn.Module) -> bool:
    """Whether a router sends each token, whole, to the expert with the best score."""
    is_gate = type(router) is TokenGate and router.top_k == 1
    return is_gate and router.gate_scale == "straight_through"


@dataclass
class _PackedExperts:
    """Weights of experts one by one, as they are multiplied.

    Attributes:
        w_in: (F, D) each, packed like all weights; none where experts have no neurons.
        b_in: (F,) each, or None.
        w_gate: (F, D) each; none where the network is not gated.
        b_gate: (F,) each, or None.
        w_out: (D, F) each.
        b_out: (D,) each, or None; all that experts without neurons have.
        activation: between the layers.
    """

    w_in: list[Tensor]
    b_in: list[Tensor | None]
    w_gate: list[Tensor]
    b_gate: list[Tensor | None]
    w_out: list[Tensor]
    b_out: list[Tensor | None]
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, experts: Experts, dtype: torch.dtype) -> _PackedExperts:
        """Cast and pack all weights."""

        def weights(name: str) -> list[Tensor]:
            stack = getattr(experts, name)
            return [] if stack is None else [pack_weight(one, dtype) for one in stack]

        def biases(name: str) -> list[Tensor | None]:
            stack = getattr(experts, f"b_{name}")
            if stack is not None:
                return [one.detach().to(dtype).clone() for one in stack]
            return [None] * experts.num_experts

        return cls(
            *(weights("w_in"), biases("in"), weights("w_gate"), biases("gate")),
            *(weights("w_out"), biases("out"), experts.activation),
        )

    @cached_property
    def native_activation(self) -> int | None:
        """See `native_activation`."""
        return native_activation(self.activation)

    def apply(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """Give each token the weighted sum of its experts: (T, D)."""
        if self.native_activation is None or not self.w_in or not load_operators():
            return self.apply_by_torch(hidden_TD, routing)
        weights_TK = None if routing.unit_weights else routing.expert_weights
        out_TD: Tensor = torch.ops.moe_dist.routed_ffn(
            hidden_TD,
            routing.expert_ids,
            weights_TK,
            *(self.w_in, self.b_in, self.w_gate, self.b_gate, self.w_out, self.b_out),
            self.native_activation,
        )
        return out_TD

    def apply_by_torch(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """Do the same without the native operator."""
        order = sort_slots(routing.expert_ids, len(self.b_out))
        sorted_SD = permute(hidden_TD, order)
        sizes = order.tokens_per_expert_E.tolist()
        parts = [
            self.apply_one(rows_SD, expert)
            for expert, rows_SD in enumerate(sorted_SD.split(sizes))
            if len(rows_SD)
        ]
        return unpermute(torch.cat(parts) if parts else sorted_SD, routing, order)

    def apply_one(self, rows_TD: Tensor, expert: int = 0) -> Tensor:
        """Apply one expert to rows: (T, D)."""
        if not self.w_in:
            bias_D = self.b_out[expert]
            zeros_TD = torch.zeros_like(rows_TD)
            return zeros_TD if bias_D is None else zeros_TD + bias_D
        num_rows = rows_TD.shape[0]
        rows_TD = round_rows(rows_TD)
        hidden_TF = multiply_packed(rows_TD, self.w_in[expert], self.b_in[expert])
        if self.w_gate:
            gate_TF = multiply_packed(rows_TD, self.w_gate[expert], self.b_gate[expert])
            hidden_TF = self.activation(gate_TF) * hidden_TF
        else:
            hidden_TF = self.activation(hidden_TF)
        return multiply_packed(hidden_TF, self.w_out[expert], self.b_out[expert])[:num_rows]
