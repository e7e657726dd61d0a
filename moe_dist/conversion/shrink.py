"""Students with fewer layers and narrower ones, started from a teacher's own weights.

A student layer takes the weights of one teacher layer, cut to the kept dimensions. The residual
stream has one set of kept dimensions for the whole model; neurons and attention dimensions are
chosen layer by layer. With everything kept the student computes what its teacher does.

BERT only so far; the names of its parameters are in `_AXES`.

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
from moe_dist.errors import ConversionError, MissingInputError

StudentInit = Literal["importance", "truncate", "random"]
LayerMap = Literal["uniform", "last"]

# What each axis of a BERT parameter runs over, by the end of the parameter's name.
_HIDDEN, _NEURON, _QUERY, _VALUE, _WHOLE = "hidden", "neuron", "query", "value", "whole"
_AXES: dict[str, tuple[str, ...]] = {
    "embeddings.weight": (_WHOLE, _HIDDEN),
    "LayerNorm.weight": (_HIDDEN,),
    "LayerNorm.bias": (_HIDDEN,),
    "self.query.weight": (_QUERY, _HIDDEN),
    "self.query.bias": (_QUERY,),
    "self.key.weight": (_QUERY, _HIDDEN),
    "self.key.bias": (_QUERY,),
    "self.value.weight": (_VALUE, _HIDDEN),
    "self.value.bias": (_VALUE,),
    "attention.output.dense.weight": (_HIDDEN, _VALUE),
    "intermediate.dense.weight": (_NEURON, _HIDDEN),
    "intermediate.dense.bias": (_NEURON,),
    "output.dense.weight": (_HIDDEN, _NEURON),
    "output.dense.bias": (_HIDDEN,),
    "pooler.dense.weight": (_HIDDEN, _HIDDEN),
    "pooler.dense.bias": (_HIDDEN,),
    "classifier.weight": (_WHOLE, _HIDDEN),
    "classifier.bias": (_WHOLE,),
    "qa_outputs.weight": (_WHOLE, _HIDDEN),
    "qa_outputs.bias": (_WHOLE,),
}
_LAYERS = "encoder.layer."


@dataclass(frozen=True)
class ShrinkPlan:
    """Which parts of a teacher a smaller student starts from.

    Args:
        layers: the teacher's layer of each student layer, from 0.
        hidden_ids: the kept dimensions of the residual stream, ascending.
        neuron_ids: for each student layer the kept neurons of its teacher layer, ascending.
        query_ids: for each student layer the kept rows of query and key, head by head.
        value_ids: the same of the value.
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
    layers; attention dimensions, within each head, by the product of the norms of the two rows (or
    row and column) that meet in them.
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
        ConversionError: if the family is not BERT, or a size does not fit the teacher.
        MissingInputError: if the scores are missing.
    """
    spec = family_of(model)
    if spec.model_type != "bert":
        raise ConversionError(
            f"a smaller student of {type(model).__name__} cannot be made: only BERT's layers and "
            "widths can be cut so far",
            remedy="leave the student section out, or use a BERT teacher",
        )
    config: Any = model.config
    slots = find_slots(model, spec)
    layers = map_layers(num_layers or len(slots), len(slots), layer_map)
    wanted_D = hidden_size or config.hidden_size
    wanted_F = intermediate_size or config.intermediate_size
    heads = num_heads or config.num_attention_heads
    _check_widths(config, wanted_D, wanted_F, heads)
    keep = _keep_first
    if init == "importance":
        keep = _keep_largest
        if wanted_F < config.intermediate_size and scores is None:
            raise MissingInputError(
                "student.init=importance needs the scores of the teacher's neurons",
                remedy="pass scores from score_importance, or use init truncate",
            )
    whole_F = torch.zeros(config.intermediate_size)
    chosen_F = [whole_F if scores is None else scores[layer] for layer in layers]
    blocks = [slots[layer].block for layer in layers]
    attention = [
        _attention_ids(block, config.num_attention_heads, heads, wanted_D // heads, init)
        for block in blocks
    ]
    hidden = _hidden_energy(model, blocks) if init == "importance" else None
    return ShrinkPlan(
        layers=layers,
        hidden_ids=keep(torch.zeros(config.hidden_size) if hidden is None else hidden, wanted_D),
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
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(plan.layers)
    config.hidden_size = len(plan.hidden_ids)
    config.intermediate_size = len(plan.neuron_ids[0])
    config.num_attention_heads = plan.num_heads
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]), torch.device(first.device):
        torch.manual_seed(seed)
        student = type(model)(config)
    leave_out(student, absent_modules(model, student))
    install_heads(student)
    student.to(dtype=first.dtype)
    if plan.init != "random":
        _copy_weights(model, student, plan)
    return student.train(model.training)


def shrink_scores(scores: Sequence[Tensor], plan: ShrinkPlan) -> list[Tensor]:
    """Hand the teacher's scores, (F,) for each FFN, on to the neurons that its student kept."""
    return [
        scores[layer][list(ids)].clone()
        for layer, ids in zip(plan.layers, plan.neuron_ids, strict=True)
    ]


def _check_widths(config: Any, hidden_size: int, intermediate_size: int, num_heads: int) -> None:
    for key, value in (
        ("hidden_size", hidden_size),
        ("intermediate_size", intermediate_size),
        ("num_attention_heads", num_heads),
    ):
        if not 1 <= value <= getattr(config, key):
            name = key.replace("attention_", "")
            raise ConversionError(
                f"student.{name}={value} does not fit a teacher whose {name} is "
                f"{getattr(config, key)}",
                remedy=f"use 1 to {getattr(config, key)}",
            )
    if hidden_size % num_heads:
        raise ConversionError(
            f"student.hidden_size={hidden_size} is not divisible by {num_heads} attention heads",
            remedy="change student.hidden_size, or give student.num_heads",
        )
    teacher_size = config.hidden_size // config.num_attention_heads
    if hidden_size // num_heads > teacher_size:
        raise ConversionError(
            f"student.num_heads={num_heads} makes heads of {hidden_size // num_heads}, and the "
            f"teacher's have {teacher_size}",
            remedy=f"use at least {-(-hidden_size // teacher_size)} heads",
        )


def _keep_first(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _keep_largest(scores: Tensor, count: int) -> tuple[int, ...]:
    # Stable, so that equal scores give the same student everywhere.
    order = torch.argsort(scores.detach().float().cpu(), descending=True, stable=True)
    return tuple(sorted(int(index) for index in order[:count]))


def _hidden_energy(model: nn.Module, blocks: Sequence[nn.Module]) -> Tensor:
    """Mean square of each dimension of the residual stream, as its normalisations let it through.

    Weights must not be asked: those that read a dimension are large where it is small.
    """
    total_D: Tensor | None = None
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for name, parameter in model.named_parameters():
        if _LAYERS in name and id(parameter) not in inside:
            continue
        if name.endswith(("LayerNorm.weight", "LayerNorm.bias")):
            square_D = parameter.detach().double().square()
            total_D = square_D if total_D is None else total_D + square_D
    assert total_D is not None
    return total_D


def _attention_ids(
    block: nn.Module, num_teacher_heads: int, num_heads: int, head_size: int, init: StudentInit
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose heads, and within each the dimensions of query and key, and of the value."""
    attention: Any = block.get_submodule("attention")
    teacher_size = attention.self.query.weight.shape[0] // num_teacher_heads
    if init == "importance":
        query_HD = _norms(attention.self.query.weight, 1) * _norms(attention.self.key.weight, 1)
        value_HD = _norms(attention.self.value.weight, 1) * _norms(attention.output.dense.weight, 0)
        query_HD = query_HD.view(num_teacher_heads, teacher_size)
        value_HD = value_HD.view(num_teacher_heads, teacher_size)
        keep = _keep_largest
    else:
        query_HD = value_HD = torch.zeros(num_teacher_heads, teacher_size)
        keep = _keep_first
    heads = keep(value_HD.sum(dim=1), num_heads)
    query, value = (
        tuple(
            head * teacher_size + dimension
            for head in heads
            for dimension in keep(scores_HD[head], head_size)
        )
        for scores_HD in (query_HD, value_HD)
    )
    return query, value


def _norms(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().square().sum(dim=axis).sqrt()


def _copy_weights(model: Any, student: Any, plan: ShrinkPlan) -> None:
    source = dict(model.named_parameters())
    head_sizes = [
        one.config.hidden_size // one.config.num_attention_heads for one in (model, student)
    ]
    scale = (head_sizes[1] / head_sizes[0]) ** 0.5
    with torch.no_grad():
        for name, target in student.named_parameters():
            teacher_name, layer = _teacher_name(name, plan)
            value = source[teacher_name]
            for axis, kind in enumerate(_axes(name)):
                ids = _ids(kind, layer, plan)
                if ids is not None:
                    value = value.index_select(axis, torch.tensor(ids, device=value.device))
            target.copy_(value * scale if "self.query." in name else value)


def _axes(name: str) -> tuple[str, ...]:
    matching = [end for end in _AXES if name.endswith(end)]
    if not matching:
        raise ConversionError(
            f"the parameter {name} cannot be cut to another width",
            remedy="use a BERT encoder with a head for classification or question answering",
        )
    return _AXES[max(matching, key=len)]


def _teacher_name(name: str, plan: ShrinkPlan) -> tuple[str, int | None]:
    before, found, after = name.partition(_LAYERS)
    if not found:
        return name, None
    number, _, rest = after.partition(".")
    return f"{before}{_LAYERS}{plan.layers[int(number)]}.{rest}", int(number)


def _ids(kind: str, layer: int | None, plan: ShrinkPlan) -> tuple[int, ...] | None:
    if kind == _WHOLE:
        return None
    if kind == _HIDDEN:
        return plan.hidden_ids
    assert layer is not None, f"{kind} outside the layers"
    by_layer = {_NEURON: plan.neuron_ids, _QUERY: plan.query_ids, _VALUE: plan.value_ids}
    return by_layer[kind][layer]
