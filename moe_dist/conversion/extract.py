"""The sub-network of one task as a plain dense model: of `task_gate`, `merged_task` and one expert.

All tokens of a task go to the same experts with the same weights, so nothing of a layer depends on
the input: its shared neurons and those of the chosen experts, their output weights scaled, are one
dense feed-forward network. Experts that are merged for the task are one already.

Of experts that are merged otherwise, or copies of one network, there is the average.

Source: task-level extraction, arXiv:2110.03742; folding merged experts is ours.

Shapes: D model, F FFN, K chosen experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.absent import absent_modules, leave_out
from moe_dist.conversion.families import FamilySpec, FFNSlot, FFNWeights, find_slots
from moe_dist.conversion.heads import (
    KEY,
    TaskHead,
    family_spec,
    head_rows,
    read_heads,
    task_head,
    task_index,
)
from moe_dist.conversion.moe_slots import MoeSettings
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.merged_layer import MergedLayer
from moe_dist.moe.routing import RoutingContext

_MOE_ENTRIES = ("moe", "model_type", "architectures", "transformers_version", KEY)


def extract_task(model: Any, task: str | None = None, *, average: bool = False) -> Any:
    """Make the dense model of one task.

    Args:
        model: of one or several tasks: dense, or converted with `task_gate`, `merged_task` or a
            single expert; it is left as it was.
        task: the task's name; None for a model of one task.
        average: take the average of all experts, whatever the router says. It needs experts that
            are merged, or copies of one network.

    Returns:
        A model of the architecture's own class, with the outputs of that task and as many neurons
        as one token uses. Where layers differ in them (`moe.layers`), the smaller ones are filled
        up with zeros, since the architecture knows one number.

    Raises:
        MissingInputError: if the task is not named, or not the model's.
        ConversionError: if the tokens of a task go to different experts, or there are none that
            have an average.
    """
    spec = family_spec(model)
    heads = read_heads(model)
    if task is None and heads:
        raise MissingInputError(
            f"the model has {len(heads)} tasks, and none is named",
            remedy=f"choose from {', '.join(head.name for head in heads)}",
        )
    index = 0 if task is None else task_index(model, task)
    layers = {layer.name: layer for layer in model.modules() if isinstance(layer, MoELayer)}
    if average:
        check_average(model)
    elif layers:
        _check_router(MoeSettings.from_dict(model.config.moe))

    def network_of(slot: FFNSlot) -> FFNWeights:
        if slot.name not in layers:
            return slot.weights()
        layer = layers[slot.name]
        return average_weights(layer) if average else dense_weights(layer, index)

    with torch.no_grad():
        networks = [network_of(slot) for slot in find_slots(model, spec)]
        size = max(network.w_in.shape[0] for network in networks)
        dense = _fresh_dense(model, spec, size, heads[index] if heads else None)
        slots = find_slots(dense, spec)
        for slot, network in zip(slots, networks, strict=True):
            _fill(slot, network)
        _copy_rest(model, dense, slots, head_rows(heads, index) if heads else slice(None))
    return dense


def dense_weights(layer: MoELayer, task: int) -> FFNWeights:
    """Join what a layer, its experts whole, computes for one task into one dense FFN's weights.

    The shared neurons come first, then each chosen expert's; a router may look at the task alone.
    """
    if isinstance(layer, MergedLayer):
        return _joined(layer, [layer.merged_weights(task)])
    experts = layer.experts
    chosen, scales = [0], torch.ones(1)
    if layer.router is not None:
        first = next(layer.router.parameters(), next(layer.router.buffers(), torch.empty(0)))
        where = first.device
        context = RoutingContext(task_ids=torch.tensor([task], device=where))
        was_training = layer.router.training
        layer.router.eval()
        routing = layer.router(torch.zeros(1, experts.d_model, device=where), context)
        layer.router.train(was_training)
        chosen, scales = routing.expert_ids[0].tolist(), routing.expert_weights[0]
    return _joined(
        layer, [_part(experts, expert, scale) for expert, scale in zip(chosen, scales, strict=True)]
    )


def average_weights(layer: MoELayer) -> FFNWeights:
    """Join a layer's shared neurons and the average of its experts into a dense FFN's weights."""
    average = {
        name: parameter.mean(dim=0)
        for name, parameter in layer.experts.named_parameters(recurse=False)
    }
    return _joined(layer, [average])


def check_average(model: Any) -> MoeSettings:
    """Give the settings of a model whose experts have an average; others are a ConversionError."""
    moe = getattr(model.config, "moe", None)
    settings = MoeSettings.from_dict(moe) if moe else None
    if settings is None or settings.num_experts == 1:
        raise ConversionError(
            "the model has no experts to be averaged", remedy="export it without --average"
        )
    if not settings.router.facts.merges and settings.partition != "full_copy":
        raise ConversionError(
            f"experts of moe.partition={settings.partition} have other neurons at the same place, "
            "whose average is nobody's",
            remedy="average merged experts, or those of moe.partition=full_copy",
        )
    return settings


def _joined(layer: MoELayer, parts: list[dict[str, Tensor]]) -> FFNWeights:
    """Put neurons beside each other, those that all tokens share first."""
    if layer.shared is not None:
        parts.insert(0, _part(layer.shared, 0, torch.ones(())))
    joined = {
        name: torch.cat([part[name] for part in parts if name in part])
        for name in ("w_in", "b_in", "w_gate", "b_gate")
        if any(name in part for part in parts)
    }
    w_out = torch.cat([part["w_out"] for part in parts if "w_out" in part], dim=1)
    biases = [part["b_out"] for part in parts if "b_out" in part]
    return FFNWeights(
        w_in=joined["w_in"],
        b_in=joined.get("b_in"),
        w_gate=joined.get("w_gate"),
        b_gate=joined.get("b_gate"),
        w_out=w_out,
        b_out=torch.stack(biases).sum(dim=0) if biases else None,
    )


def _check_router(settings: MoeSettings) -> None:
    facts = settings.router.facts if settings.num_experts > 1 else None
    if facts is not None and facts.merges and facts.chooses_by != "task":
        raise ConversionError(
            f"{settings.router.router} merges experts anew for each sequence, so no dense model "
            "does the same",
            remedy="fold a student of moe.router=merged_task, or take the average of all experts "
            "(export --average)",
        )
    if facts is not None and facts.chooses_by != "task":
        raise ConversionError(
            f"{settings.router.router} sends the tokens of one task to different experts, so no "
            "dense model does the same",
            remedy="keep its experts (export --format hf), or extract from a student with "
            "moe.router=task_gate",
        )


def _part(experts: Experts, expert: int, scale: Tensor) -> dict[str, Tensor]:
    """One expert's weights, by the names of `Experts` without the E axis, its outputs scaled."""
    part = {name: value[expert] for name, value in experts.named_parameters(recurse=False)}
    for name in ("w_out", "b_out"):
        if name in part:
            part[name] = part[name] * scale.to(part[name])
    return part


def _fresh_dense(model: Any, spec: FamilySpec, size: int, head: TaskHead | None) -> nn.Module:
    import transformers

    values = copy.deepcopy(model.config.to_dict())
    activation = (values.get("moe") or {}).get("activation", {})
    values = {name: value for name, value in values.items() if name not in _MOE_ENTRIES}
    values |= activation | dict.fromkeys(spec.size_keys, size)
    if head is not None:
        values |= head.kind.model_settings(head.label_names)
    kind = getattr(transformers, type(model).__name__.removeprefix("Moe"))
    config = getattr(transformers, spec.config_class)(**values)
    config.architectures = [kind.__name__]
    config._attn_implementation = model.config._attn_implementation
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # the start values are all overwritten
        dense: nn.Module = kind(config)
    leave_out(dense, absent_modules(model, dense))
    if getattr(model, "generation_config", None) is not None:
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.to(device=first.device, dtype=first.dtype).eval()


def _fill(slot: FFNSlot, network: FFNWeights) -> None:
    target = slot.weights()
    for name in ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out"):
        into, value = getattr(target, name), getattr(network, name)
        assert (into is None) == (value is None), f"{slot.name}: {name}"
        if into is not None:
            into.zero_()
            into[tuple(slice(0, length) for length in value.shape)].copy_(value)


def _copy_rest(model: nn.Module, dense: nn.Module, slots: list[FFNSlot], rows: slice) -> None:
    """Copy what lies outside the feed-forward networks, and the rows of the task's head."""
    filled = {
        id(parameter)
        for slot in slots
        for linear in (slot.linear_in, slot.gate, slot.linear_out)
        if linear is not None
        for parameter in linear.parameters()
    }
    source = dict(model.state_dict())
    head = set() if rows == slice(None) else {id(one) for one in task_head(dense).parameters()}
    for name, value in dense.state_dict(keep_vars=True).items():
        if id(value) not in filled:
            value.copy_(source[name][rows] if id(value) in head else source[name])
