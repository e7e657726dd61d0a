"""Making a trained mixture smaller: fewer experts.

It changes what a model computes, and wants a short distillation from the model as it was. MicroBERT
names the step without its formulas; how experts are compared and joined here is our choice: an
expert is a set of neurons, so two of them are joined by taking the neurons that matter most of
both, where a dense feed-forward layer had them all.

Shapes: D model, F neurons of an expert, N numbers that make a neuron, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.errors import ConversionError
from moe_dist.inference.neurons import (
    INTO,
    neuron_vectors,
    neurons_of,
    put_neurons,
    rebuilt,
)
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import moe_layers
from moe_dist.router_spec import NO_ROUTER

CompactMethod = Literal["merge", "drop"]
Groups = tuple[tuple[int, ...], ...]
ALIKE = 0.9
"""Neurons of joined experts whose cosine is above become one, their mean."""


@dataclass(frozen=True)
class LayerGroups:
    """What became of one layer's experts.

    Args:
        layer: its name.
        groups: the old experts of each new one; the first of a group was used most.
        use: the old experts' shares of the tokens.
    """

    layer: str
    groups: Groups
    use: tuple[float, ...]


def compact_experts(
    model: Any,
    num_experts: int,
    *,
    use: Mapping[str, Sequence[float]],
    method: CompactMethod = "merge",
) -> tuple[Any, list[LayerGroups]]:
    """Bring every layer down to fewer experts.

    Experts are joined two by two, those first whose joining costs least: the smaller share of
    tokens times how unlike the two are. A joined expert keeps its size.

    Args:
        model: a converted model; it is left as it was.
        num_experts: experts of each layer afterwards; with 1 nothing is routed any more.
        use: each expert's share of the tokens, by layer name.
        method: ``merge`` joins the neurons of a group; ``drop`` keeps its most used expert.

    Returns:
        A new model, and what was joined in each layer.

    Raises:
        ConversionError: if the model has no more experts than that, needs more for each token, or
            has a router whose choices cannot be joined.
    """
    check_reduction(model, num_experts)
    layers = moe_layers(model)
    chosen = []
    for layer in layers:
        share_E = torch.tensor(use[layer.name], dtype=torch.float64)
        groups = group_experts(share_E, expert_similarity(layer.experts), num_experts)
        chosen.append(LayerGroups(layer.name, groups, tuple(share_E.tolist())))
    changes: dict[str, Any] = {"num_experts": num_experts}
    if num_experts == 1:
        changes |= {"router": NO_ROUTER, "top_k": 1}
    smaller = rebuilt(model, changes)
    with torch.no_grad():
        for old, new, joined in zip(layers, moe_layers(smaller), chosen, strict=True):
            _fill_experts(old.experts, new.experts, joined, method)
            if old.shared is not None and new.shared is not None:
                new.shared.load_state_dict(old.shared.state_dict())
            if new.router is not None and old.router is not None:
                _fill_router(old.router, new.router, joined, method)
    return smaller, chosen


def check_reduction(model: nn.Module, num_experts: int) -> None:
    """Refuse a number of experts that a model cannot be brought down to.

    It must be fewer than it has and enough for each token, and its router's choices must join; else
    a ConversionError.
    """
    layers = moe_layers(model)
    if any(layer.merges for layer in layers):
        raise ConversionError(
            "merged experts cost as much as one whatever their number, so there is nothing to join",
            remedy="prune their neurons (--expert-size), or export the model as a dense one with "
            "--fold or --average",
        )
    fewest = min(layer.num_experts for layer in layers)
    top_k = layers[0].top_k
    if not 1 <= num_experts < fewest:
        raise ConversionError(
            f"{num_experts} experts are not fewer than the model's {fewest}",
            remedy=f"use 1 to {fewest - 1}" if fewest > 1 else "give a model with several experts",
        )
    if 1 < num_experts < top_k or (num_experts == 1 and top_k > 1):
        raise ConversionError(
            f"each token uses {top_k} experts, so {num_experts} are too few",
            remedy=f"use at least {top_k}",
        )
    for layer in layers:
        for name, tensor in layer.router.state_dict().items() if layer.router else ():
            if tensor.is_floating_point() and tensor.shape != (
                layer.num_experts,
                layer.experts.d_model,
            ):
                raise ConversionError(
                    f"the choices of {type(layer.router).__name__} cannot be joined ({name})",
                    remedy="compact a student with hash routing, a gate over hidden states, or "
                    "`moe.task_map: fixed`",
                )


def expert_similarity(experts: Experts) -> Tensor:
    """Compare experts by their neurons, whatever the order these are in.

    Args:
        experts: of one layer.

    Returns:
        (E, E) float64: the mean, over the neurons of both, of the cosine with the most similar
        neuron of the other; 1 on the diagonal.
    """
    number = experts.num_experts
    similarity_EE = torch.eye(number, dtype=torch.float64)
    if experts.expert_size == 0:
        return torch.ones_like(similarity_EE)
    vectors_EFN = functional.normalize(neuron_vectors(experts), dim=-1)
    for one in range(number):
        for other in range(one):
            cosine_FF = vectors_EFN[one] @ vectors_EFN[other].t()
            best = cosine_FF.amax(dim=1).mean() + cosine_FF.amax(dim=0).mean()
            similarity_EE[one, other] = similarity_EE[other, one] = best.double() / 2
    return similarity_EE


def group_experts(use_E: Tensor, similarity_EE: Tensor, num_groups: int) -> Groups:
    """Join experts until few enough are left.

    Args:
        use_E: each expert's share of the tokens.
        similarity_EE: from `expert_similarity`.
        num_groups: how many are to be left.

    Returns:
        The experts of each group, the most used first; groups in the order of their first numbers.
    """
    groups = [[expert] for expert in range(len(use_E))]
    while len(groups) > num_groups:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]

        def cost(pair: tuple[int, int]) -> float:
            one, other = groups[pair[0]], groups[pair[1]]
            alike = similarity_EE[one][:, other].mean()
            return float(torch.minimum(use_E[one].sum(), use_E[other].sum()) * (1 - alike))

        later, earlier = min(pairs, key=cost)
        groups[earlier] += groups.pop(later)
    by_use = [sorted(group, key=lambda expert: -float(use_E[expert])) for group in groups]
    return tuple(tuple(group) for group in sorted(by_use, key=min))


def _fill_experts(old: Experts, new: Experts, joined: LayerGroups, method: CompactMethod) -> None:
    use_E = torch.tensor(joined.use)
    for index, group in enumerate(joined.groups):
        members = group[:1] if method == "drop" else group
        share = use_E[list(members)].clamp(min=1e-9)
        share = (share / share.sum()).to(next(old.parameters()).device)
        if old.b_out is not None:
            assert new.b_out is not None
            new.b_out[index].copy_((share.unsqueeze(-1) * old.b_out[list(members)]).sum(dim=0))
        if old.expert_size:
            put_neurons(new, index, _joined_neurons(old, members, share))


def _joined_neurons(old: Experts, members: Sequence[int], share: Tensor) -> dict[str, Tensor]:
    """The neurons of a group that matter most, those that are alike taken together."""
    kept = neurons_of(old, members[0])
    weight_F = torch.full((old.expert_size,), float(share[0]), device=share.device)
    for member, part in zip(members[1:], share[1:], strict=True):
        other = neurons_of(old, member)
        cosine = functional.normalize(_flat(other)) @ functional.normalize(_flat(kept)).t()
        best, match = cosine.max(dim=1)
        # One neuron of the newcomer for each that is there; the most similar wins.
        taken: dict[int, int] = {}
        for neuron in best.argsort(descending=True).tolist():
            if float(best[neuron]) > ALIKE:
                taken.setdefault(int(match[neuron]), neuron)
        here = torch.tensor(list(taken), dtype=torch.long, device=share.device)
        there = torch.tensor(list(taken.values()), dtype=torch.long, device=share.device)
        left = torch.ones(old.expert_size, dtype=torch.bool, device=share.device)
        left[there] = False
        total = weight_F[here] + part
        for name, values in kept.items():
            extra = other[name]
            # Neurons lie in the first dimension here.
            shape = (-1, *[1] * (values.dim() - 1))
            values[here] = (
                values[here] * weight_F[here].view(shape) + extra[there] * part
            ) / total.view(shape)
            kept[name] = torch.cat([values, extra[left]])
        weight_F[here] = total
        weight_F = torch.cat([weight_F, part.expand(int(left.sum()))])
    into = torch.cat(
        [kept[name].reshape(len(weight_F), -1) for name in INTO if name in kept], dim=1
    )
    value_F = weight_F * into.float().norm(dim=1) * kept["w_out"].float().norm(dim=1)
    best_ids = value_F.topk(old.expert_size).indices.sort().values
    return {name: values[best_ids] for name, values in kept.items()}


def _flat(neurons: Mapping[str, Tensor]) -> Tensor:
    parts = [neurons[name].reshape(len(neurons["w_out"]), -1) for name in sorted(neurons)]
    return torch.cat(parts, dim=1).float()


def _fill_router(
    old: nn.Module, new: nn.Module, joined: LayerGroups, method: CompactMethod
) -> None:
    """Send what an old expert received to the expert that it went into."""
    new_ids = torch.zeros(len(joined.use), dtype=torch.long)
    for index, group in enumerate(joined.groups):
        new_ids[list(group)] = index
    use_E = torch.tensor(joined.use).clamp(min=1e-9)
    state = {}
    for name, tensor in old.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = new_ids.to(tensor.device)[tensor.long()].to(tensor.dtype)
            continue
        rows = []
        for group in joined.groups:
            members = list(group[:1] if method == "drop" else group)
            share = (use_E[members] / use_E[members].sum()).to(tensor)
            rows.append((share.unsqueeze(-1) * tensor[members]).sum(dim=0))
        state[name] = torch.stack(rows)
    new.load_state_dict(state)
