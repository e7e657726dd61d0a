"""Merged weights kept while a model writes step by step, where a merge would serve one token.

A step has one token of each sequence, for which K experts are cheaper than a merge; but the tokens
of a segment, or of a task, come one after another and all need the same. So what comes up again is
merged and kept, in the key-value cache, until other weights are asked for. What is kept is never
more than the experts that it is of.

Shapes: T tokens, G groups, D model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dist.moe.experts import Experts
from moe_dist.moe.merge import Merges, TokenGroups, stacked_merges
from moe_dist.moe.routing import Routing


@dataclass
class KeptMerge:
    """One layer's latest merges.

    Args:
        asked: what its gates said, of which each step asks whether it is the same, with one
            read from the device.
        num_groups: of which they said it.
        groups: the tokens by it.
        merged: the experts and weights of all groups, with no group twice.
        is_less: than the experts themselves are to read; else it is not kept.
        weights: (G, ...) by parameter name; None where they were asked for once only.
    """

    asked: Tensor
    num_groups: int
    groups: TokenGroups
    merged: Tensor
    is_less: bool
    weights: dict[str, Tensor] | None = None


def merge_and_keep(
    experts: Experts, rows_TD: Tensor, merges: Merges, kept: dict[str, KeptMerge], name: str
) -> Tensor | None:
    """Apply merges that are kept, or are asked for the second time, and keep these.

    Args:
        experts: of the layer.
        rows_TD: its input.
        merges: how the experts come together.
        kept: by layer; changed.
        name: of the layer.

    Returns:
        (T, D); None where nothing is kept.
    """
    asked = torch.cat([_numbers(merges.by_linear), merges.group_T.double()])
    num_groups = _num_groups(merges.by_linear)
    found = kept.get(name)
    if found is None or found.num_groups != num_groups or not torch.equal(found.asked, asked):
        latest = _latest(merges, asked)
        # Sequences in another order, as beam search leaves them, may ask for the same merges.
        known = found is not None and torch.equal(found.merged, latest.merged)
        if found is not None and known:
            latest = replace(latest, weights=found.weights)
        found = kept[name] = latest
        if not known:
            return None
    if not found.is_less:
        return None
    groups = found.groups
    if found.weights is None:
        own = Merges(groups.by_linear, groups.group_T)
        found.weights = stacked_merges(dict(experts.named_parameters(recurse=False)), own)
    counts_G = torch.tensor(groups.sizes, device="cpu")
    return groups.in_order(
        experts.with_weights(found.weights, groups.sorted_rows(rows_TD), counts_G)
    )


def _latest(merges: Merges, asked: Tensor) -> KeptMerge:
    groups = TokenGroups.of(merges.joined())
    num_used = min(groups.num_used.values())
    return KeptMerge(
        asked,
        _num_groups(merges.by_linear),
        groups,
        _numbers(groups.by_linear),
        is_less=len(groups.sizes) < num_used,
    )


def _numbers(by_linear: Mapping[str, Routing]) -> Tensor:
    return torch.cat(
        [
            value.flatten().double()
            for one in by_linear.values()
            for value in (one.expert_ids, one.expert_weights)
        ]
    )


def _num_groups(by_linear: Mapping[str, Routing]) -> int:
    return len(next(iter(by_linear.values())).expert_ids)
