"""What a smaller student keeps of its teacher: dimensions of the residual stream, and heads.

Shapes: D model, A attention (heads times head size), H heads, G groups of heads that share a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_dist.conversion.families import FFNSlot
from moe_dist.conversion.shrink_layouts import HIDDEN, NEURON, QUERY, WHOLE, ShrinkLayout
from moe_dist.errors import ConversionError

StudentInit = Literal["importance", "truncate", "random"]


def keep_first(scores: Tensor, count: int) -> tuple[int, ...]:
    """Keep the first ones, whatever their scores."""
    return tuple(range(count))


def keep_largest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Keep those of the largest scores, ascending."""
    # Stable, so that equal scores give the same student everywhere.
    order = torch.argsort(scores.detach().float().cpu(), descending=True, stable=True)
    return tuple(sorted(int(index) for index in order[:count]))


def stream_sizes(model: nn.Module, layout: ShrinkLayout, slots: Sequence[FFNSlot]) -> Tensor:
    """Say how large each dimension of the residual stream is where the kept layers read it.

    Weights that read it must not be asked: they are large where the dimension is small.
    """
    inside = {id(parameter) for slot in slots for parameter in slot.block.parameters()}
    normalised, written = [], []
    for name, parameter in model.named_parameters():
        if layout.layers in name and id(parameter) not in inside:
            continue
        axes, value = axes_of(layout, model.config, name), parameter.detach().double()
        if axes == (HIDDEN,) and "norm" in name.lower():
            normalised.append(value.square())
        elif name.endswith("embed_tokens.weight"):
            written.append(value.square().mean(dim=0))
        elif axes in ((HIDDEN, QUERY), (HIDDEN, NEURON)):
            written.append(value.square().sum(dim=1))
    total_D = torch.stack(normalised).sum(dim=0)
    return total_D if layout.normalises_after else total_D * torch.stack(written).sum(dim=0)


def head_ids(
    layout: ShrinkLayout,
    block: nn.Module,
    config: Any,
    num_heads: int,
    head_size: int,
    init: StudentInit,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose heads, and within each the dimensions of query and key, and of the value."""
    query, key, value, out = attention_weights(layout, block)
    num_teacher_heads = config.num_attention_heads
    teacher_size = query.shape[0] // num_teacher_heads
    if init == "importance":
        query_HD = (_norms(query, 1) * _norms(key, 1)).view(num_teacher_heads, teacher_size)
        value_HD = (_norms(value, 1) * _norms(out, 0)).view(num_teacher_heads, teacher_size)
        keep = keep_largest
    else:
        query_HD = value_HD = torch.zeros(num_teacher_heads, teacher_size)
        keep = keep_first
    heads = keep(value_HD.sum(dim=1), num_heads)
    query_ids, value_ids = (
        tuple(
            head * teacher_size + dimension
            for head in heads
            for dimension in keep(scores_HD[head], head_size)
        )
        for scores_HD in (query_HD, value_HD)
    )
    return query_ids, value_ids


def group_ids(
    layout: ShrinkLayout,
    block: nn.Module,
    config: Any,
    num_heads: int,
    init: StudentInit,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose groups of heads that share a key: their rows of the query, and of key and value."""
    query, _, value, out = attention_weights(layout, block)
    num_groups = config.num_key_value_heads
    per_query, per_value = query.shape[0] // num_groups, value.shape[0] // num_groups
    keep, sizes_G = keep_first, torch.zeros(num_groups)
    if init == "importance":
        keep = keep_largest
        # Each of a group's heads reads the same values through rows of its own.
        out_GHD = _norms(out, 0).view(num_groups, -1, per_value)
        sizes_G = (_norms(value, 1).view(num_groups, 1, per_value) * out_GHD).sum(dim=(1, 2))
    groups = keep(sizes_G, num_heads * num_groups // config.num_attention_heads)
    query_ids, value_ids = (
        tuple(group * size + row for group in groups for row in range(size))
        for size in (per_query, per_value)
    )
    return query_ids, value_ids


def attention_weights(layout: ShrinkLayout, block: nn.Module) -> list[Tensor]:
    """Give a block's weights of query, key, value and output."""
    weights: list[Any] = [block.get_submodule(path).weight for path in layout.attention]
    return weights


def _norms(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().square().sum(dim=axis).sqrt()


def axes_of(layout: ShrinkLayout, config: Any, name: str) -> tuple[str, ...]:
    """Say what the axes of a parameter run over; one not known is a ConversionError."""
    matching = [end for end in layout.axes if f".{name}".endswith((f".{end}", f"_{end}"))]
    if not matching:
        raise ConversionError(
            f"the parameter {name} cannot be cut to another width",
            remedy="use a model without a head, or with one for classification or question "
            "answering, or leave the student section out",
        )
    axes = layout.axes[max(matching, key=len)]
    if layout.own_embeddings and config.embedding_size != config.hidden_size:
        return tuple(WHOLE for _ in axes) if ".embeddings." in f".{name}" else axes
    return axes
