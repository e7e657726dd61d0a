"""Merged weights kept while a model writes step by step, where a merge would serve one token.

A step has one token of each sequence, for which K experts are cheaper than a merge; but the tokens
of a segment, or of a task, come one after another and all need the same. So what comes up again is
merged and kept, in the key-value cache, until other weights are asked for. What is kept is never
more than the experts that it is of.

Shapes: G groups, K chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.moe.experts import Experts
from moe_dist.moe.merge import Merges, TokenGroups, stacked_merges

Key = tuple[tuple[object, ...], ...]


@dataclass
class KeptMerge:
    """One layer's latest merges.

    Args:
        key: the experts and weights of all groups.
        weights: (G, ...) by parameter name; None where they were asked for once only.
    """

    key: Key
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
    groups = TokenGroups.of(merges.joined())
    by_linear = groups.by_linear
    num_used = min(len(torch.unique(one.expert_ids)) for one in by_linear.values())
    if len(groups.sizes) >= num_used:
        # The experts themselves are no more to read.
        kept.pop(name, None)
        return None
    key = tuple(
        tuple(
            zip(
                *(value.flatten().tolist() for value in (one.expert_ids, one.expert_weights)),
                strict=True,
            )
        )
        for one in by_linear.values()
    )
    before = kept.get(name)
    if before is None or before.key != key:
        kept[name] = KeptMerge(key)
        return None
    if before.weights is None:
        own = Merges(by_linear, groups.group_T)
        before.weights = stacked_merges(dict(experts.named_parameters(recurse=False)), own)
    counts_G = torch.tensor(groups.sizes, device="cpu")
    return groups.in_order(
        experts.with_weights(before.weights, groups.sorted_rows(rows_TD), counts_G)
    )
