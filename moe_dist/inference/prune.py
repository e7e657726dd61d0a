"""Smaller experts after training: each keeps the neurons that matter most for its own tokens.

Shapes: F neurons of one expert, s tied shared neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.errors import ConversionError
from moe_dist.inference.neurons import neuron_norms, rebuilt
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer, moe_layers


@dataclass(frozen=True)
class LayerNeurons:
    """What one layer's experts kept.

    Args:
        layer: its name.
        shared_ids: kept tied shared neurons, ascending.
        own_ids: for each expert its kept neurons, ascending.
        kept_importance: share of the layer's importance that they have.
        unscored_experts: those whose tokens the loss does not read, such as those without a first
            token in the last layer of a classifier; they keep the neurons of the largest weights.
    """

    layer: str
    shared_ids: tuple[int, ...]
    own_ids: tuple[tuple[int, ...], ...]
    kept_importance: float
    unscored_experts: tuple[int, ...]


def prune_experts(
    model: Any, expert_size: int, scores: Sequence[Tensor]
) -> tuple[Any, list[LayerNeurons]]:
    """Leave every expert its most important neurons.

    Of tied shared neurons as many stay, in all layers alike, as keep the most importance at that
    size, but at least one is each expert's own where one was: for a token of one expert a shared
    neuron costs as much as an own one, and serves all experts. (For one of K experts own neurons
    cost K times as much, which does not count here.) Where scores are equal the neurons of larger
    weights stay. Merged experts all keep the same places, since neurons of one place become one;
    what counts is the sum of their scores.

    Args:
        model: a converted model; it is left as it was.
        expert_size: neurons that an expert computes for a token afterwards, shared ones included.
        scores: one (s + E·F,) tensor for each layer, from `score_expert_importance`.

    Returns:
        A new model, and what each layer kept.

    Raises:
        ConversionError: if the experts are no larger than that, or the scores do not fit.

    Source: a second pass of importance scoring, after distillation, is ours.
    """
    check_expert_size(model, expert_size)
    layers = moe_layers(model)
    if len(scores) != len(layers):
        raise ConversionError(
            f"{len(layers)} layers have experts, but {len(scores)} are scored",
            remedy="score this model with score_expert_importance",
        )
    parts = [_split(layer, score_N) for layer, score_N in zip(layers, scores, strict=True)]
    norms = [_by_place(layer, neuron_norms(layer.experts)) for layer in layers]
    num_shared = _best_num_shared(parts, expert_size)
    smaller = rebuilt(model, _settings(model.config.moe, expert_size, num_shared))
    found = []
    with torch.no_grad():
        for old, new, part, norm_EF in zip(layers, moe_layers(smaller), parts, norms, strict=True):
            kept = _chosen(old.name, part, norm_EF, num_shared, expert_size - num_shared)
            if old.merges:
                kept = _everywhere(kept, old.num_experts)
            found.append(kept)
            _fill(old, new, kept)
    return smaller, found


def check_expert_size(model: nn.Module, expert_size: int) -> None:
    """Refuse a size, in neurons with shared ones, that is no smaller than the model's experts'."""
    sizes = [layer.experts.expert_size + layer.num_shared_neurons for layer in moe_layers(model)]
    if not 1 <= expert_size < min(sizes):
        raise ConversionError(
            f"{expert_size} neurons are not fewer than the {min(sizes)} of the model's experts",
            remedy=f"use 1 to {min(sizes) - 1}"
            if min(sizes) > 1
            else "give a model of larger experts",
        )


def _split(layer: MoELayer, score_N: Tensor) -> tuple[Tensor, Tensor]:
    """(s,) and (E, F) float64, both divided by the layer's sum; of merged experts (1, F)."""
    shared, experts = layer.num_shared_neurons, layer.experts
    expected = shared + experts.num_experts * experts.expert_size
    if score_N.shape != (expected,):
        raise ConversionError(
            f"{layer.name} has {expected} neurons, but its scores are {tuple(score_N.shape)}",
            remedy="score this model with score_expert_importance",
        )
    part_N = score_N.double() / score_N.double().sum().clamp(min=1e-300)
    own_EF = part_N[shared:].view(experts.num_experts, experts.expert_size)
    return part_N[:shared], _by_place(layer, own_EF)


def _by_place(layer: MoELayer, values_EF: Tensor) -> Tensor:
    """Add up over merged experts, whose neurons of one place become one: (1, F); else (E, F)."""
    return values_EF.sum(dim=0, keepdim=True) if layer.merges else values_EF


def _everywhere(kept: LayerNeurons, num_experts: int) -> LayerNeurons:
    """From what merged experts keep together to what each of them keeps."""
    unscored = tuple(range(num_experts)) if kept.unscored_experts else ()
    return replace(kept, own_ids=kept.own_ids * num_experts, unscored_experts=unscored)


def _best_num_shared(parts: Sequence[tuple[Tensor, Tensor]], expert_size: int) -> int:
    """How many tied shared neurons keep the most importance, over all layers."""
    own_size, shared = parts[0][1].shape[1], len(parts[0][0])
    fewest_own = min(1, own_size)
    choices = range(max(0, expert_size - own_size), min(shared, expert_size - fewest_own) + 1)

    def kept(num_shared: int) -> float:
        own = expert_size - num_shared
        return sum(
            float(shared_S.topk(num_shared).values.sum() + own_EF.topk(own).values.sum())
            for shared_S, own_EF in parts
        )

    return max(choices, key=kept)


def _settings(settings: dict[str, Any], expert_size: int, num_shared: int) -> dict[str, Any]:
    tied = bool(settings["tie_shared"]) and num_shared > 0
    # Untied shared neurons only start alike: after training each expert keeps what it needs.
    return {
        "expert_size": expert_size,
        "tie_shared": tied,
        "num_shared_neurons": num_shared if tied else 0,
    }


def _chosen(
    name: str, part: tuple[Tensor, Tensor], norm_EF: Tensor, num_shared: int, num_own: int
) -> LayerNeurons:
    shared_S, own_EF = part
    best_s = shared_S.topk(num_shared).indices.sort().values
    # By weights first, then stably by scores: weights decide among equals.
    by_norm_EF = norm_EF.argsort(dim=1, descending=True, stable=True)
    by_score_EF = own_EF.gather(1, by_norm_EF).argsort(dim=1, descending=True, stable=True)
    best_EF = by_norm_EF.gather(1, by_score_EF)[:, :num_own].sort(dim=1).values
    kept = float(shared_S[best_s].sum() + own_EF.gather(1, best_EF).sum())
    unscored = (own_EF.sum(dim=1) == 0).nonzero().flatten() if own_EF.shape[1] else best_s[:0]
    return LayerNeurons(
        layer=name,
        shared_ids=tuple(best_s.tolist()),
        own_ids=tuple(tuple(ids) for ids in best_EF.tolist()),
        kept_importance=kept,
        unscored_experts=tuple(unscored.tolist()),
    )


def _fill(old: MoELayer, new: MoELayer, kept: LayerNeurons) -> None:
    if old.shared is not None and new.shared is not None:
        _copy_neurons(old.shared, new.shared, 0, kept.shared_ids)
    for expert, ids in enumerate(kept.own_ids):
        _copy_neurons(old.experts, new.experts, expert, ids)
    if old.experts.b_out is not None and new.experts.b_out is not None:
        new.experts.b_out.copy_(old.experts.b_out)
    if old.router is not None and new.router is not None:
        new.router.load_state_dict(old.router.state_dict())


def _copy_neurons(old: Experts, new: Experts, expert: int, ids: Sequence[int]) -> None:
    if not ids:
        return
    for name, target in new.named_parameters(recurse=False):
        source = getattr(old, name)[expert]
        if name == "w_out":
            target[expert].copy_(source[:, list(ids)])
        elif name != "b_out":
            target[expert].copy_(source[list(ids)])
