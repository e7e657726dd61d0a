"""An MoE layer in operations that an exporter can write down.

Which rows an expert multiplies is found by the graph itself, so that it follows the data.

Shapes: N rows, T tokens, D model, F neurons of one expert, K active experts, S slots (a token and
one of its experts).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing import Routing, current_context


class TraceableFFN(nn.Module):
    """In the place of a `MoELayer`, with the same output, for the length of an export.

    Args:
        layer: that it is made of.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.router = layer.router
        self._experts = nn.ModuleList(
            _Expert(layer.experts, number) for number in range(layer.num_experts)
        )
        self._shared = None if layer.shared is None else _Expert(layer.shared, 0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply shared neurons and the chosen experts to every token, as the layer does."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        if self.router is None:
            out_TD: Tensor = self._experts[0](hidden_TD)
        else:
            out_TD = self._by_experts(hidden_TD, self.router(hidden_TD, current_context()))
        if self._shared is not None:
            out_TD = out_TD + self._shared(hidden_TD)
        return out_TD.view(hidden.shape)

    def _by_experts(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        num_tokens, top_k = routing.expert_ids.shape
        ids_S = routing.expert_ids.reshape(-1)
        token_of_slot_S = torch.arange(num_tokens).unsqueeze(1).expand(-1, top_k).reshape(-1)
        out_SD = hidden_TD.new_zeros(num_tokens * top_k, hidden_TD.shape[1])
        for number, expert in enumerate(self._experts):
            slots_N = torch.nonzero(ids_S == number).squeeze(1)
            tokens_N = slots_N if top_k == 1 else token_of_slot_S.index_select(0, slots_N)
            rows_ND = expert(hidden_TD.index_select(0, tokens_N))
            out_SD = out_SD.index_put((slots_N,), rows_ND)
        if routing.unit_weights:
            return out_SD
        weights_S1 = routing.expert_weights.reshape(-1, 1)
        return (out_SD * weights_S1).view(num_tokens, top_k, -1).sum(dim=1)


class _Expert(nn.Module):
    """One expert with weights of its own: of a stack, quantizers would leave all in float32."""

    def __init__(self, experts: Experts, number: int) -> None:
        super().__init__()
        self.activation = experts.activation
        for name, stack in experts.named_parameters(recurse=False):
            own = stack.detach()[number]
            # As a product takes it, so that no graph turns it round in each call.
            own = own.t().contiguous() if name.startswith("w_") else own.clone()
            self.register_parameter(name, nn.Parameter(own, requires_grad=False))

    def forward(self, rows_ND: Tensor) -> Tensor:
        """Apply it to rows: (N, D)."""
        if "w_in" not in self._parameters:
            zeros_ND = torch.zeros_like(rows_ND)
            bias_D = self._parameters.get("b_out")
            return zeros_ND if bias_D is None else zeros_ND + bias_D
        inner_NF = self._multiply(rows_ND, "in")
        if "w_gate" in self._parameters:
            inner_NF = self.activation(self._multiply(rows_ND, "gate")) * inner_NF
        else:
            inner_NF = self.activation(inner_NF)
        return self._multiply(inner_NF, "out")

    def _multiply(self, rows: Tensor, suffix: str) -> Tensor:
        out = rows @ self.get_parameter(f"w_{suffix}")
        bias = self._parameters.get(f"b_{suffix}")
        return out if bias is None else out + bias
