"""Slow oracle of `MoELayer`: one token at a time, straight from the definition.

Tests compare outputs and gradients with it. Shapes: T tokens, D model, F neurons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing import Routing, current_context


def reference_expert(experts: Experts, token_D: Tensor, expert: int) -> Tensor:
    """Apply one expert to one token, without dropout.

    Args:
        experts: the stacked experts.
        token_D: the token.
        expert: which expert.

    Returns:
        (D,) output.
    """

    def pick(stack: Tensor | None) -> Tensor | None:
        return None if stack is None else stack[expert]

    b_out = pick(experts.b_out)
    if experts.w_in is None or experts.w_out is None:
        return torch.zeros_like(token_D) if b_out is None else b_out
    hidden_F = F.linear(token_D, experts.w_in[expert], pick(experts.b_in))
    if experts.w_gate is None:
        hidden_F = experts.activation(hidden_F)
    else:
        gate_F = F.linear(token_D, experts.w_gate[expert], pick(experts.b_gate))
        hidden_F = experts.activation(gate_F) * hidden_F
    return F.linear(hidden_F, experts.w_out[expert], b_out)


def reference_dispatch(hidden_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Apply the chosen experts to every token, one by one.

    Args:
        hidden_TD: tokens.
        routing: which experts, with which weights.
        experts: all experts of the layer.

    Returns:
        (T, D) weighted sums.
    """
    outputs = []
    for token, token_D in enumerate(hidden_TD):
        out_D = torch.zeros_like(token_D)
        for k, expert in enumerate(routing.expert_ids[token].tolist()):
            weight = routing.expert_weights[token, k]
            out_D = out_D + weight * reference_expert(experts, token_D, expert)
        outputs.append(out_D)
    return torch.stack(outputs) if outputs else torch.zeros_like(hidden_TD)


def reference_layer(layer: MoELayer, hidden: Tensor) -> Tensor:
    """Compute what `MoELayer.forward` returns, one token at a time and without dropout.

    Args:
        layer: the layer, with all its experts in this process.
        hidden: (B, S, D) or (T, D).

    Returns:
        The same shape.
    """
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    if layer.router is None:
        tokens = [reference_expert(layer.experts, token_D, 0) for token_D in hidden_TD]
        out_TD = torch.stack(tokens) if tokens else torch.zeros_like(hidden_TD)
    else:
        routing = layer.router(hidden_TD, current_context())
        out_TD = reference_dispatch(hidden_TD, routing, layer.experts)
    if layer.shared is not None and hidden_TD.shape[0]:
        shared = [reference_expert(layer.shared, token_D, 0) for token_D in hidden_TD]
        out_TD = out_TD + torch.stack(shared)
    return out_TD.view(hidden.shape)
