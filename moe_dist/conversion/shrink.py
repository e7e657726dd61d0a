"""Students with fewer layers and narrower ones, started from a teacher's own weights.

A student layer takes the weights of one teacher layer, cut to the kept dimensions. The residual
stream has one set of kept dimensions for the whole model; neurons and attention dimensions are
chosen layer by layer. With everything kept the student computes what its teacher does.

`shrink_layouts` knows the families that can be cut, and the names of their parameters.

Shapes: D model, F FFN, A attention (heads times head size).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_dist.conversion.absent import absent_modules, leave_out
from moe_dist.conversion.families import family_of, find_slots
from moe_dist.conversion.heads import install_heads
from moe_dist.conversion.shrink_choices import (
    StudentInit,
    attention_weights,
    axes_of,
    group_ids,
    head_ids,
    keep_first,
    keep_largest,
    stream_sizes,
)
from moe_dist.conversion.shrink_layouts import (
    HIDDEN,
    NEURON,
    QUERY,
    VALUE,
    WHOLE,
    ShrinkLayout,
    layout_of,
)
from moe_dist.errors import ConversionError, MissingInputError

LayerMap = Literal["uniform", "last"]


@dataclass(frozen=True)
class ShrinkPlan:
    """Which parts of a teacher a smaller student starts from.

    Args:
        layers: the teacher's layer of each student layer, from 0.
        hidden_ids: the kept dimensions of the residual stream, ascending.
        neuron_ids: for each student layer the kept neurons of its teacher layer, ascending.
        query_ids: for each student layer the kept rows of query and key, head by head; where
            several heads share a key, those of the query alone.
        value_ids: the same of the value; where several heads share it, of key and value.
        num_heads: attention heads of the student.
        init: how they were chosen.
    """

    layers: tuple[int, ...]
    hidden_ids: tuple[int, ...]
    neuron_ids: tuple[tuple[int, ...], ...]
    query_ids: tuple[tuple[int, ...], ...]
    value_ids: tuple[tuple[int, ...], ...]
    num_heads: int
    init: StudentInit


def map_layers(
    num_layers: int, num_teacher_layers: int, layer_map: LayerMap | Sequence[int] = "uniform"
) -> tuple[int, ...]:
    """Choose the teacher layer that each student layer starts from and is compared with.

    Args:
        num_layers: layers of the student.
        num_teacher_layers: layers of the teacher.
        layer_map: ``uniform`` takes g(i) = i·L_teacher/L_student, rounded, with layers counted
            from 1 (so the last goes to the last); ``last`` takes the last ones; or one number of
            a teacher layer, from 0, for each student layer.

    Returns:
        Numbers of teacher layers, from 0, strictly ascending.

    Raises:
        ConversionError: if the student is deeper, or a given map does not fit.

    Source: the uniform map is TinyBERT's, arXiv:1909.10351.
    """
    if not 1 <= num_layers <= num_teacher_layers:
        raise ConversionError(
            f"student.num_layers={num_layers} does not fit a teacher of {num_teacher_layers} "
            "layers",
            remedy=f"use 1 to {num_teacher_layers} layers",
        )
    if layer_map == "uniform":
        return tuple(
            (2 * i * num_teacher_layers + num_layers) // (2 * num_layers) - 1
            for i in range(1, num_layers + 1)
        )
    if layer_map == "last":
        return tuple(range(num_teacher_layers - num_layers, num_teacher_layers))
    given = [int(layer) for layer in layer_map]
    ascending = all(one < other for one, other in pairwise(given))
    if len(given) != num_layers or not ascending:
        raise ConversionError(
            f"student.layer_map={given} is no map for {num_layers} layers",
            remedy="name one teacher layer for each student layer, ascending",
        )
    if given[0] < 0 or given[-1] >= num_teacher_layers:
        raise ConversionError(
            f"student.layer_map={given} names layers that the teacher does not have",
            remedy=f"use numbers from 0 to {num_teacher_layers - 1}",
        )
    return tuple(given)


def plan_shrink(
    model: nn.Module,
    *,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_heads: int | None = None,
    layer_map: LayerMap | Sequence[int] = "uniform",
    init: StudentInit = "importance",
    scores: Sequence[Tensor] | None = None,
) -> ShrinkPlan:
    """Choose what a smaller student keeps of its teacher. A size not given is the teacher's.

    With ``importance`` neurons are kept by their scores; dimensions of the residual stream by their
    size, which is the squared scale plus the squared offset of the normalisations in the kept
    layers (in Llama's kind, which normalises when it reads, the squared scale times the mean square
    of the weights that write the dimension); attention dimensions, within each head, by the product
    of the norms of the two rows (or row and column) that meet in them. Llama's kind keeps whole
    groups of heads that share a key, chosen likewise.
    These choices are ours: no paper says how to cut the width of a fine-tuned teacher.

    Args:
        model: the dense teacher.
        num_layers: layers of the student.
        hidden_size: D of the student.
        intermediate_size: F of the student.
        num_heads: attention heads of the student.
        layer_map: see `map_layers`.
        init: ``importance``; ``truncate`` keeps the first of everything; ``random`` takes no
            weights from the teacher, and keeps the first for maps and scores.
        scores: (F,) for each FFN of the teacher; needed for ``importance`` with fewer neurons.

    Returns:
        The plan.

    Raises:
        ConversionError: if the family cannot be cut, or a size does not fit the teacher.
        MissingInputError: if the scores are missing.
    """
    spec = family_of(model)
    layout = layout_of(model, spec)
    config: Any = model.config
    for name, _ in model.named_parameters():
        axes_of(layout, config, name)  # refuses heads that cannot be cut
    slots = find_slots(model, spec)
    layers = map_layers(num_layers or len(slots), len(slots), layer_map)
    num_neurons = slots[0].num_neurons
    wanted_D = hidden_size or config.hidden_size
    wanted_F = intermediate_size or num_neurons
    heads = num_heads or config.num_attention_heads
    _check_widths(layout, config, num_neurons, wanted_D, wanted_F, heads)
    keep = keep_first
    if init == "importance":
        keep = keep_largest
        if wanted_F < num_neurons and scores is None:
            raise MissingInputError(
                "student.init=importance needs the scores of the teacher's neurons",
                remedy="pass scores from score_importance, or use init truncate",
            )
    whole_F = torch.zeros(num_neurons)
    chosen_F = [whole_F if scores is None else scores[layer] for layer in layers]
    chosen = [slots[layer] for layer in layers]
    attention = [
        head_ids(layout, slot.block, config, heads, wanted_D // heads, init)
        if layout.narrows_heads
        else group_ids(layout, slot.block, config, heads, init)
        for slot in chosen
    ]
    size_D = torch.zeros(config.hidden_size)
    if init == "importance":
        size_D = stream_sizes(model, layout, chosen)
    return ShrinkPlan(
        layers=layers,
        hidden_ids=keep(size_D, wanted_D),
        neuron_ids=tuple(keep(score_F, wanted_F) for score_F in chosen_F),
        query_ids=tuple(query for query, _ in attention),
        value_ids=tuple(value for _, value in attention),
        num_heads=heads,
        init=init,
    )


def shrink_model(model: Any, plan: ShrinkPlan, *, seed: int = 0) -> Any:
    """Make the smaller student: a plain dense model of the teacher's own class.

    Args:
        model: the dense teacher; it is left as it was.
        plan: what is kept, from `plan_shrink`.
        seed: of the weights, for ``random``.

    Returns:
        A new model in the teacher's mode. Scores of query and key keep their scale: they are
        divided by the root of the head size, which is smaller in the student.

    Raises:
        ConversionError: if the model has a parameter that cannot be cut.
    """
    spec = family_of(model)
    layout = layout_of(model, spec)
    config = _small_config(model, layout, spec.size_keys, plan)
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]), torch.device(first.device):
        torch.manual_seed(seed)
        student = type(model)(config)
    leave_out(student, absent_modules(model, student))
    install_heads(student)
    student.to(dtype=first.dtype)
    if plan.init != "random":
        _copy_weights(model, student, layout, plan)
    return student.train(model.training)


def shrink_scores(scores: Sequence[Tensor], plan: ShrinkPlan) -> list[Tensor]:
    """Hand the teacher's scores, (F,) for each FFN, on to the neurons that its student kept."""
    return [
        scores[layer][list(ids)].clone()
        for layer, ids in zip(plan.layers, plan.neuron_ids, strict=True)
    ]


def _small_config(
    model: Any, layout: ShrinkLayout, size_keys: Sequence[str], plan: ShrinkPlan
) -> Any:
    config = copy.deepcopy(model.config)
    if layout.own_embeddings and config.embedding_size == config.hidden_size:
        config.embedding_size = len(plan.hidden_ids)
    if not layout.narrows_heads:
        head_size = len(plan.query_ids[0]) // plan.num_heads
        config.head_dim = head_size
        config.num_key_value_heads = len(plan.value_ids[0]) // head_size
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in plan.layers]
    config.num_hidden_layers = len(plan.layers)
    config.hidden_size = len(plan.hidden_ids)
    config.num_attention_heads = plan.num_heads
    for key in size_keys:
        setattr(config, key, len(plan.neuron_ids[0]))
    return config


def _check_widths(
    layout: ShrinkLayout,
    config: Any,
    num_neurons: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
) -> None:
    for name, value, largest in (
        ("hidden_size", hidden_size, config.hidden_size),
        ("intermediate_size", intermediate_size, num_neurons),
        ("num_heads", num_heads, config.num_attention_heads),
    ):
        if not 1 <= value <= largest:
            raise ConversionError(
                f"student.{name}={value} does not fit a teacher whose {name} is {largest}",
                remedy=f"use 1 to {largest}",
            )
    if hidden_size % num_heads:
        raise ConversionError(
            f"student.hidden_size={hidden_size} is not divisible by {num_heads} attention heads",
            remedy="change student.hidden_size, or give student.num_heads",
        )
    if not layout.drops_heads and num_heads != config.num_attention_heads:
        raise ConversionError(
            f"student.num_heads={num_heads}: the layers of {config.model_type} share what they "
            f"know of places by head, so that all {config.num_attention_heads} heads stay",
            remedy="leave student.num_heads out, and choose student.hidden_size to fit",
        )
    group = config.num_attention_heads // getattr(
        config, "num_key_value_heads", config.num_attention_heads
    )
    if num_heads % group:
        raise ConversionError(
            f"student.num_heads={num_heads}: the teacher's heads share keys by {group}, and only "
            "whole groups are kept",
            remedy=f"use a multiple of {group}",
        )
    teacher_size = config.hidden_size // config.num_attention_heads
    if layout.narrows_heads and hidden_size // num_heads > teacher_size:
        raise ConversionError(
            f"student.num_heads={num_heads} makes heads of {hidden_size // num_heads}, and the "
            f"teacher's have {teacher_size}",
            remedy=f"use at least {-(-hidden_size // teacher_size)} heads",
        )
    own = config.embedding_size if layout.own_embeddings else config.hidden_size
    if own != config.hidden_size and own == hidden_size:
        raise ConversionError(
            f"student.hidden_size={hidden_size} is the width of the embeddings, and then "
            f"{config.model_type} has no projection between them, as the teacher has",
            remedy="use another student.hidden_size",
        )


def _copy_weights(model: Any, student: Any, layout: ShrinkLayout, plan: ShrinkPlan) -> None:
    source = dict(model.named_parameters())
    block = find_slots(model)[0].block
    teacher_size = attention_weights(layout, block)[0].shape[0] / model.config.num_attention_heads
    scale = (len(plan.query_ids[0]) / plan.num_heads / teacher_size) ** 0.5
    with torch.no_grad():
        for name, target in student.named_parameters():
            teacher_name, layer = _teacher_name(name, layout, plan)
            value = source[teacher_name]
            for axis, kind in enumerate(axes_of(layout, model.config, name)):
                ids = _ids(kind, layer, plan)
                if ids is not None:
                    value = value.index_select(axis, torch.tensor(ids, device=value.device))
            target.copy_(value * scale if f".{layout.attention.query}." in name else value)


def _teacher_name(name: str, layout: ShrinkLayout, plan: ShrinkPlan) -> tuple[str, int | None]:
    before, found, after = name.partition(layout.layers)
    if not found:
        return name, None
    number, _, rest = after.partition(".")
    return f"{before}{layout.layers}{plan.layers[int(number)]}.{rest}", int(number)


def _ids(kind: str, layer: int | None, plan: ShrinkPlan) -> tuple[int, ...] | None:
    if kind == WHOLE:
        return None
    if kind == HIDDEN:
        return plan.hidden_ids
    assert layer is not None, f"{kind} outside the layers"
    by_layer = {NEURON: plan.neuron_ids, QUERY: plan.query_ids, VALUE: plan.value_ids}
    return by_layer[kind][layer]
