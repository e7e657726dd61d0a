"""A dense model and a plan become a mixture of experts.

Shapes: D model, F FFN, E experts, s shared neurons, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.absent import absent_modules, leave_out
from moe_dist.conversion.families import FFNSlot, FFNWeights, find_slots
from moe_dist.conversion.heads import read_heads
from moe_dist.conversion.moe_slots import MoeSettings, router_for
from moe_dist.conversion.partition import LayerPartition, PartitionPlan
from moe_dist.errors import ConversionError
from moe_dist.moe.experts import Experts
from moe_dist.moe.gates import TokenGate
from moe_dist.moe.layer import MoELayer
from moe_dist.router_spec import DEFAULT_ROUTER, NO_ROUTER, RouterSpec


def dense_to_moe(
    model: nn.Module,
    plan: PartitionPlan,
    *,
    router: str | RouterSpec = DEFAULT_ROUTER,
    top_k: int | None = None,
    seed: int = 0,
    token_counts: Tensor | None = None,
    num_tasks: int | None = None,
    gates: Sequence[Tensor] | None = None,
    **options: Any,
) -> Any:
    """Make the sparse student of a dense model.

    Everything outside the FFNs is the model's own: weights, biases, dropout, mode, frozen
    parameters. With every neuron in every expert the student computes the same function
    (`gate_scale` "probability" excepted).

    Args:
        model: a dense transformers model; it is left as it was.
        plan: which neurons go where.
        router: a name in `moe_dist.moe.routers.ROUTERS`, or one with its options; not read with
            one expert.
        top_k: experts for each token; their weights are renormalised to sum 1. When not given it
            is the router's own, 1 for a name.
        seed: of hash tables and gates.
        token_counts: (V,) counts on the training split, for hash_balanced.
        num_tasks: for task_gate; those of the model's heads when not given.
        gates: for each FFN of the model (E, D), what a token_gate starts with (from
            `moe_dist.conversion.token_clusters`); at random when not given.
        **options: other fields of `RouterSpec`, such as gate_noise.

    Returns:
        A new model of the registered class, e.g. MoeBertForSequenceClassification.

    Raises:
        ConversionError: if the model's class is not known, or the plan is not for this model.
        MissingInputError: if the router needs something that was not given.
    """
    slots = find_slots(model)
    _check_plan(slots, plan)
    if gates is not None and len(gates) != len(slots):
        raise ConversionError(
            f"there are {len(gates)} gates, but the model has {len(slots)} FFNs",
            remedy="pass one for each, from token_clusters on this model",
        )
    spec = RouterSpec.of(router, **(options if top_k is None else options | {"top_k": top_k}))
    routed = plan.num_experts > 1
    if not routed:
        spec = replace(spec, router=NO_ROUTER, top_k=1, capacity_factor=None)
    if num_tasks is None:
        num_tasks = len(read_heads(model)) or None
    settings = MoeSettings(
        num_experts=plan.num_experts,
        expert_size=plan.expert_size,
        num_shared_neurons=plan.num_shared_neurons,
        tie_shared=plan.tie_shared,
        layers=plan.layers,
        router=spec,
        seed=seed,
        num_tasks=num_tasks,
        partition=plan.method,
        vocab_size=_vocab_size(model),
    )
    if routed:
        # A checkpoint's table may stand in for missing counts, but here there is none.
        router_for(
            settings,
            d_model=slots[0].weights().w_in.shape[1],
            vocab_size=_vocab_size(model),
            token_counts=token_counts,
        )
    student = _fresh_student(model, settings.to_dict(), token_counts)
    layers = {layer.name: layer for layer in student.modules() if isinstance(layer, MoELayer)}
    parts = {part.layer: part for part in plan.partitions}
    with torch.no_grad():
        for slot in slots:
            if slot.index in parts:
                if gates is not None and routed:
                    _start_gate(layers[slot.name], gates[slot.index])
                _fill_layer(layers[slot.name], slot.weights(), parts[slot.index], plan.tie_shared)
    return student


def _fresh_student(model: Any, moe: dict[str, Any], token_counts: Tensor | None) -> Any:
    from moe_dist.conversion.configurations import config_class
    from moe_dist.conversion.modeling import model_class

    kind = model_class(f"Moe{type(model).__name__}")
    values = copy.deepcopy(model.config.to_dict())
    model_type = values.pop("model_type")
    config: Any = config_class(model_type)(**values, moe=moe)
    config.architectures = [kind.__name__]
    config._attn_implementation = model.config._attn_implementation
    with torch.random.fork_rng(devices=[]):  # the start values below are all overwritten
        student: Any = kind(config, token_counts=token_counts)
    first = next(model.parameters())
    student.to(device=first.device, dtype=first.dtype)
    # Moving to the meta device parts what was one weight.
    student.tie_weights()
    absent = absent_modules(model, student)
    if absent:
        leave_out(student, absent)
        config.moe = moe | {"absent": absent}
    _copy_weights(model, student)
    return with_modes_of(model, student)


def _copy_weights(model: nn.Module, student: Any) -> None:
    """Take over everything outside the FFNs, or say what does not fit."""
    source, target = model.state_dict(), student.state_dict()
    in_layers = _below(
        name for name, layer in student.named_modules() if isinstance(layer, MoELayer)
    )
    in_ffns = _below(
        f"{slot.name}.{path}"
        for slot in find_slots(model)
        for path in (slot.spec.linear_in, slot.spec.linear_out, slot.spec.gated_in, slot.spec.gate)
        if path is not None
    )
    strays = [name for name in target if name not in source and not name.startswith(in_layers)]
    strays += [name for name in source if name not in target and not name.startswith(in_ffns)]
    strays += [
        name for name in source if name in target and source[name].shape != target[name].shape
    ]
    strays += [
        f"{name}, which differs from {other}"
        for name, other in student.all_tied_weights_keys.items()
        if name in source and _differ(source[name], source[other])
    ]
    if strays:
        raise ConversionError(
            f"{type(model).__name__} is not what its configuration describes: "
            f"{', '.join(sorted(strays)[:4])}",
            remedy="build the model from its configuration, and give both the same sizes, modules "
            "and ties",
        )
    kept = {name: value for name, value in source.items() if name in target}
    student.load_state_dict(kept, strict=False)


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() != other.data_ptr() and not torch.equal(one, other)


def _below(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)


def with_modes_of(model: Any, other: Any) -> Any:
    """Hand what is frozen, how it generates and the training mode on from `model` to `other`."""
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if getattr(model, "generation_config", None) is not None:
        other.generation_config = copy.deepcopy(model.generation_config)
    return other.train(model.training)


def _start_gate(layer: MoELayer, gate_ED: Tensor) -> None:
    if type(layer.router) is not TokenGate or layer.router.gate.weight.shape != gate_ED.shape:
        raise ConversionError(
            f"a gate of the shape {tuple(gate_ED.shape)} does not fit the router of {layer.name}",
            remedy="take the router token_gate, and gates for this model and number of experts",
        )
    layer.router.gate.weight.copy_(gate_ED)


def _fill_layer(
    layer: MoELayer, weights: FFNWeights, part: LayerPartition, tie_shared: bool
) -> None:
    num_tied = part.shared_ids.numel() if tie_shared else 0
    _fill_experts(layer.experts, weights, part.expert_ids[:, num_tied:])
    if layer.shared is not None:
        _fill_experts(layer.shared, weights, part.shared_ids[None])


def _fill_experts(experts: Experts, weights: FFNWeights, ids_EF: Tensor) -> None:
    """Copy neurons into the stacked weights; the output bias goes to every expert."""
    ids_EF = ids_EF.to(weights.w_in.device)
    for name in ("w_in", "b_in", "w_gate", "b_gate"):
        target, source = getattr(experts, name), getattr(weights, name)
        if target is not None:
            target.copy_(source[ids_EF])
    if experts.w_out is not None:
        experts.w_out.copy_(weights.w_out[:, ids_EF].transpose(0, 1))
    if experts.b_out is not None:
        assert weights.b_out is not None
        experts.b_out.copy_(weights.b_out.expand_as(experts.b_out))


def _check_plan(slots: Sequence[FFNSlot], plan: PartitionPlan) -> None:
    if plan.num_layers != len(slots):
        raise ConversionError(
            f"the plan is for {plan.num_layers} FFNs, but the model has {len(slots)}",
            remedy="score this model and plan again",
        )
    for part in plan.partitions:
        num_neurons = slots[part.layer].num_neurons
        if part.num_neurons != num_neurons:
            raise ConversionError(
                f"the plan splits {part.num_neurons} neurons of FFN {part.layer}, but the model's "
                f"has {num_neurons}",
                remedy="score this model and plan again",
            )


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
