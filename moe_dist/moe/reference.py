"""Slow oracles of `MoELayer` and `Capacity`: one token at a time, straight from the definition.

Tests compare outputs and gradients with it. Shapes: T tokens, D model, F neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.capacity import Capacity
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.merge_gates import MergeGate
from moe_dist.moe.merged_layer import MergedLayer
from moe_dist.moe.routing import Routing, current_context


def reference_expert(experts: Experts, token_D: Tensor, expert: int) -> Tensor:
    """Apply one expert to one token, without dropout."""
    own = {name: stack[expert] for name, stack in experts.named_parameters(recurse=False)}
    return _one_ffn(experts, token_D, own)


def _one_ffn(experts: Experts, token_D: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    b_out = weights.get("b_out")
    if "w_in" not in weights:
        return torch.zeros_like(token_D) if b_out is None else b_out
    hidden_F = F.linear(token_D, weights["w_in"], weights.get("b_in"))
    if "w_gate" in weights:
        gate_F = F.linear(token_D, weights["w_gate"], weights.get("b_gate"))
        hidden_F = experts.activation(gate_F) * hidden_F
    else:
        hidden_F = experts.activation(hidden_F)
    return F.linear(hidden_F, weights["w_out"], b_out)


def reference_dispatch(hidden_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Apply the chosen experts to every token, one by one: (T, D) weighted sums."""
    outputs = []
    for token, token_D in enumerate(hidden_TD):
        out_D = torch.zeros_like(token_D)
        for k, expert in enumerate(routing.expert_ids[token].tolist()):
            weight = routing.expert_weights[token, k]
            out_D = out_D + weight * reference_expert(experts, token_D, expert)
        outputs.append(out_D)
    return torch.stack(outputs) if outputs else torch.zeros_like(hidden_TD)


def reference_capacity(
    capacity: Capacity, routing: Routing, num_experts: int, mask_T: Tensor | None
) -> Routing:
    """Do what `Capacity.apply` does, slot by slot: turn away who finds an expert full."""
    ids = routing.expert_ids.tolist()
    num_tokens, top_k = routing.expert_ids.shape
    real = [True] * num_tokens if mask_T is None else mask_T.tolist()
    slots = [(token, k) for k in range(top_k) for token in range(num_tokens) if real[token]]
    if capacity.policy == "probability" and routing.logits is not None:
        probability = routing.logits.detach().softmax(dim=-1)
        slots.sort(key=lambda slot: -float(probability[slot[0], ids[slot[0]][slot[1]]]))
    limit = max(1, math.ceil(round(capacity.factor * sum(real) * top_k / num_experts, 6)))
    load = [0] * num_experts
    kept_TK = torch.zeros_like(routing.expert_ids, dtype=torch.bool)
    for token, k in slots:
        expert = ids[token][k]
        if load[expert] < limit:
            load[expert] += 1
            kept_TK[token, k] = True
    weights = torch.where(kept_TK, routing.expert_weights, 0.0)
    return replace(routing, expert_weights=weights, unit_weights=False, kept=kept_TK)


def reference_merge(layer: MergedLayer, hidden: Tensor) -> Tensor:
    """Compute what `MergedLayer.forward` returns: each token with a merge of its own."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    router = cast(MergeGate, layer.router)
    merges = router(hidden_TD, current_context())
    outputs = []
    for token_D, group in zip(router.prepare(hidden_TD), merges.group_T.tolist(), strict=True):
        one = {}
        for name, stack in layer.experts.named_parameters(recurse=False):
            routing = merges.by_linear[name.partition("_")[2]]
            ids, weights = routing.expert_ids[group].tolist(), routing.expert_weights[group]
            one[name] = sum(weights[k] * stack[expert] for k, expert in enumerate(ids))
        out_D = _one_ffn(layer.experts, token_D, one)
        if layer.shared is not None:
            out_D = out_D + reference_expert(layer.shared, token_D, 0)
        outputs.append(out_D)
    return torch.stack(outputs).view(hidden.shape) if outputs else torch.zeros_like(hidden)


def reference_layer(layer: MoELayer, hidden: Tensor) -> Tensor:
    """Compute what `MoELayer.forward` returns, one token at a time and without dropout."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    if layer.router is None:
        tokens = [reference_expert(layer.experts, token_D, 0) for token_D in hidden_TD]
        out_TD = torch.stack(tokens) if tokens else torch.zeros_like(hidden_TD)
    else:
        context = current_context()
        routing = layer.router(hidden_TD, context)
        if layer.capacity is not None and layer.training:
            mask = None if context is None else context.mask
            mask_T = None if mask is None else mask.reshape(-1)
            routing = reference_capacity(layer.capacity, routing, layer.num_experts, mask_T)
        out_TD = reference_dispatch(hidden_TD, routing, layer.experts)
    if layer.shared is not None and hidden_TD.shape[0]:
        shared = [reference_expert(layer.shared, token_D, 0) for token_D in hidden_TD]
        out_TD = out_TD + torch.stack(shared)
    return out_TD.view(hidden.shape)
