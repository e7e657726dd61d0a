"""Making a trained mixture smaller: neurons that are alike stored once, and fewer experts.

Fusion changes nothing that a model computes. Compression does, and wants a short distillation from
the model as it was. MicroBERT names both steps without their formulas; how experts are compared
and joined here is our choice: an expert is a set of neurons, so two of them are joined by taking
the neurons that matter most of both, where a dense feed-forward layer had them all.

Shapes: D model, F neurons of an expert, N numbers that make a neuron, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.conversion.convert import with_modes_of
from moe_dist.conversion.moe_slots import MoeSettings
from moe_dist.errors import ConversionError
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer, moe_layers
from moe_dist.router_spec import NO_ROUTER

CompactMethod = Literal["merge", "drop"]
Groups = tuple[tuple[int, ...], ...]
ALIKE = 0.9
"""Neurons of joined experts whose cosine is above become one, their mean."""

_INTO = ("w_in", "b_in", "w_gate", "b_gate")


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
    """See that a model can be brought down to so many experts.

    Args:
        model: a converted model.
        num_experts: experts of each layer afterwards.

    Raises:
        ConversionError: if it has no more than that, needs more for each token, or has a router
            whose choices cannot be joined.
    """
    layers = moe_layers(model)
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
    matches = [_alike_in_all(layer.experts, tolerance) for layer in layers]
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


def rebuilt(model: Any, changes: Mapping[str, Any]) -> Any:
    """Make a model of the same class with other experts, all else copied.

    Args:
        model: a converted model; it is left as it was.
        changes: entries of its configuration's `moe`.

    Returns:
        The model, whose experts and routers are still to be filled.
    """
    config = copy.deepcopy(model.config)
    config.moe = {**config.moe, **changes}
    with torch.random.fork_rng(devices=[]):
        fresh = type(model)(config)
    first = next(model.parameters())
    fresh.to(device=first.device, dtype=first.dtype)
    inside = tuple(
        f"{name}." for name, layer in model.named_modules() if isinstance(layer, MoELayer)
    )
    state = {
        name: value for name, value in model.state_dict().items() if not name.startswith(inside)
    }
    _, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    return with_modes_of(model, fresh)


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
    vectors_EFN = functional.normalize(_neurons(experts), dim=-1)
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


@torch.no_grad()
def neuron_norms(experts: Experts) -> Tensor:
    """Tell how much a neuron can do: the length of its input weights times that of its output's.

    Args:
        experts: of one layer.

    Returns:
        (E, F) float32.
    """
    if experts.w_out is None:
        return torch.zeros(experts.num_experts, 0)
    into = [
        tensor.float().square().reshape(*tensor.shape[:2], -1).sum(dim=-1)
        for name in _INTO
        if (tensor := getattr(experts, name)) is not None
    ]
    total_EF = torch.stack(into).sum(dim=0).sqrt() * experts.w_out.float().norm(dim=1)
    return total_EF.cpu()


def _neurons(experts: Experts) -> Tensor:
    """(E, F, N) float32: all numbers that make each neuron, side by side."""
    assert experts.w_in is not None and experts.w_out is not None
    parts = [experts.w_in, experts.w_out.transpose(1, 2)]
    for extra in (experts.w_gate, experts.b_in, experts.b_gate):
        if extra is not None:
            parts.append(extra if extra.dim() == 3 else extra.unsqueeze(-1))
    return torch.cat([part.detach().float() for part in parts], dim=-1)


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
            _put_neurons(new, index, _joined_neurons(old, members, share))


def _joined_neurons(old: Experts, members: Sequence[int], share: Tensor) -> dict[str, Tensor]:
    """The neurons of a group that matter most, those that are alike taken together."""
    kept = _neurons_of(old, members[0])
    weight_F = torch.full((old.expert_size,), float(share[0]), device=share.device)
    for member, part in zip(members[1:], share[1:], strict=True):
        other = _neurons_of(old, member)
        cosine = functional.normalize(_flat(other)) @ functional.normalize(_flat(kept)).t()
        best, place = cosine.max(dim=1)
        # One neuron of the newcomer for each that is there; the most similar wins.
        taken: dict[int, int] = {}
        for neuron in best.argsort(descending=True).tolist():
            if float(best[neuron]) > ALIKE:
                taken.setdefault(int(place[neuron]), neuron)
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
        [kept[name].reshape(len(weight_F), -1) for name in _INTO if name in kept], dim=1
    )
    value_F = weight_F * into.float().norm(dim=1) * kept["w_out"].float().norm(dim=1)
    best_ids = value_F.topk(old.expert_size).indices.sort().values
    return {name: values[best_ids] for name, values in kept.items()}


def _neurons_of(experts: Experts, expert: int) -> dict[str, Tensor]:
    """One expert's weights with neurons in the first dimension, copied."""
    assert experts.w_out is not None
    found = {"w_out": experts.w_out[expert].t().clone()}
    for name in _INTO:
        tensor = getattr(experts, name)
        if tensor is not None:
            found[name] = tensor[expert].clone()
    return found


def _flat(neurons: Mapping[str, Tensor]) -> Tensor:
    parts = [neurons[name].reshape(len(neurons["w_out"]), -1) for name in sorted(neurons)]
    return torch.cat(parts, dim=1).float()


def _put_neurons(experts: Experts, index: int, neurons: Mapping[str, Tensor]) -> None:
    for name, values in neurons.items():
        target = getattr(experts, name)[index]
        target.copy_(values.t() if name == "w_out" else values)


def _fill_router(
    old: nn.Module, new: nn.Module, joined: LayerGroups, method: CompactMethod
) -> None:
    """Send what an old expert received to the expert that it went into."""
    places = torch.zeros(len(joined.use), dtype=torch.long)
    for index, group in enumerate(joined.groups):
        places[list(group)] = index
    use_E = torch.tensor(joined.use).clamp(min=1e-9)
    state = {}
    for name, tensor in old.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = places.to(tensor.device)[tensor.long()].to(tensor.dtype)
            continue
        rows = []
        for group in joined.groups:
            members = list(group[:1] if method == "drop" else group)
            share = (use_E[members] / use_E[members].sum()).to(tensor)
            rows.append((share.unsqueeze(-1) * tensor[members]).sum(dim=0))
        state[name] = torch.stack(rows)
    new.load_state_dict(state)


def _alike_in_all(experts: Experts, tolerance: float) -> list[tuple[int, ...]]:
    """For each neuron that all experts hold, its place in each of them; the closest first."""
    if experts.expert_size == 0:
        return []
    vectors_EFN = _neurons(experts)
    length_F = vectors_EFN[0].norm(dim=-1).clamp(min=1e-12)
    worst_F = torch.zeros_like(length_F)
    places = [torch.arange(experts.expert_size, device=length_F.device)]
    for other_FN in vectors_EFN[1:]:
        distance_FF = torch.cdist(
            vectors_EFN[0], other_FN, compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest_F, place_F = distance_FF.min(dim=1)
        places.append(place_F)
        worst_F = torch.maximum(worst_F, nearest_F / length_F)
    found: list[tuple[int, ...]] = []
    taken: list[set[int]] = [set() for _ in places]
    for neuron in worst_F.argsort(stable=True).tolist():
        if float(worst_F[neuron]) > tolerance:
            break
        where = tuple(int(place[neuron]) for place in places)
        if all(place not in used for place, used in zip(where, taken, strict=True)):
            found.append(where)
            for place, used in zip(where, taken, strict=True):
                used.add(place)
    return found


def _fill_fused(old: Experts, layer: MoELayer, alike: Sequence[tuple[int, ...]]) -> None:
    assert layer.shared is not None
    experts = [_neurons_of(old, expert) for expert in range(old.num_experts)]
    shared: dict[str, Tensor] = {}
    for name in experts[0]:
        same = [values[name][[where[e] for where in alike]] for e, values in enumerate(experts)]
        shared[name] = torch.stack(same).mean(dim=0)
    _put_neurons(layer.shared, 0, shared)
    for index, values in enumerate(experts):
        private = torch.ones(old.expert_size, dtype=torch.bool)
        private[[where[index] for where in alike]] = False
        if layer.experts.expert_size:
            own = {name: tensor[private.to(tensor.device)] for name, tensor in values.items()}
            _put_neurons(layer.experts, index, own)
    if old.b_out is not None and layer.experts.b_out is not None:
        layer.experts.b_out.copy_(old.b_out)
