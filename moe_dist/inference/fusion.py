"""Neurons that all experts of a layer hold alike, stored once.

Nothing changes of what a model computes.

Shapes: F neurons of an expert, N numbers that make a neuron, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_dist.conversion.moe_slots import MoeSettings
from moe_dist.inference.neurons import neuron_vectors, neurons_of, put_neurons, rebuilt
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer, moe_layers


def fuse_neurons(model: Any, tolerance: float = 1e-6) -> tuple[Any, int]:
    """Store neurons that all experts of a layer hold alike once, beside the routed ones.

    Args:
        model: a converted model; it is left as it was.
        tolerance: largest distance of two neurons, relative to their length, at which they count
            as alike; they become their mean, so that 0 changes nothing.

    Returns:
        A new model with that many shared neurons in every layer, and their number; the model
        itself and 0 where there are none, where they are shared already, or where a gate's
        probability scales what an expert gives.
    """
    layers = moe_layers(model)
    if any(layer.shared is not None or layer.num_experts == 1 for layer in layers):
        return model, 0
    spec = MoeSettings.from_dict(model.config.moe).router
    if spec.gate_scale == "probability" and spec.has_gate:
        return model, 0
    matches = [_alike_in_all(layer.experts, tolerance, in_place=layer.merges) for layer in layers]
    count = min(len(found) for found in matches)
    if count == 0:
        return model, 0
    fused = rebuilt(model, {"tie_shared": True, "num_shared_neurons": count})
    with torch.no_grad():
        for old, new, found in zip(layers, moe_layers(fused), matches, strict=True):
            _fill_fused(old.experts, new, found[:count])
            if old.router is not None and new.router is not None:
                new.router.load_state_dict(old.router.state_dict())
    return fused, count


def _alike_in_all(experts: Experts, tolerance: float, *, in_place: bool) -> list[tuple[int, ...]]:
    """For each neuron that all experts hold, its index in each of them; the closest first.

    With `in_place` it must be the same index in all, as merging takes neurons together.
    """
    if experts.expert_size == 0:
        return []
    vectors_EFN = neuron_vectors(experts)
    length_F = vectors_EFN[0].norm(dim=-1).clamp(min=1e-12)
    worst_F = torch.zeros_like(length_F)
    indices = [torch.arange(experts.expert_size, device=length_F.device)]
    is_same_place_FF = indices[0].unsqueeze(1) == indices[0]
    for other_FN in vectors_EFN[1:]:
        distance_FF = torch.cdist(
            vectors_EFN[0], other_FN, compute_mode="donot_use_mm_for_euclid_dist"
        )
        if in_place:
            distance_FF = distance_FF.masked_fill(~is_same_place_FF, torch.inf)
        nearest_F, match_F = distance_FF.min(dim=1)
        indices.append(match_F)
        worst_F = torch.maximum(worst_F, nearest_F / length_F)
    found: list[tuple[int, ...]] = []
    taken: list[set[int]] = [set() for _ in indices]
    for neuron in worst_F.argsort(stable=True).tolist():
        if float(worst_F[neuron]) > tolerance:
            break
        where = tuple(int(index[neuron]) for index in indices)
        if all(index not in used for index, used in zip(where, taken, strict=True)):
            found.append(where)
            for index, used in zip(where, taken, strict=True):
                used.add(index)
    return found


def _fill_fused(old: Experts, layer: MoELayer, alike: Sequence[tuple[int, ...]]) -> None:
    assert layer.shared is not None
    experts = [neurons_of(old, expert) for expert in range(old.num_experts)]
    shared: dict[str, Tensor] = {}
    for name in experts[0]:
        same = [values[name][[where[e] for where in alike]] for e, values in enumerate(experts)]
        shared[name] = torch.stack(same).mean(dim=0)
    put_neurons(layer.shared, 0, shared)
    for index, values in enumerate(experts):
        private = torch.ones(old.expert_size, dtype=torch.bool)
        private[[where[index] for where in alike]] = False
        if layer.experts.expert_size:
            own = {name: tensor[private.to(tensor.device)] for name, tensor in values.items()}
            put_neurons(layer.experts, index, own)
    if old.b_out is not None and layer.experts.b_out is not None:
        layer.experts.b_out.copy_(old.b_out)
