"""Experts merged into one before the multiply: ``x·(Σ g_k W_k)ᵀ + Σ g_k b_k``.

Tokens of one group (a task, a sequence, a segment of one) share a merge, which costs as much as K
tokens and is then used by all of them.

Shapes: T tokens, G groups, K chosen experts, E experts, L consecutive ones, I input width, O output
width, D model, F neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.dispatch import permute, sort_slots, unpermute
from moe_dist.moe.experts import Experts, compute_dtype
from moe_dist.moe.grouped_linear import can_use_grouped_mm, group_rows, grouped_linear
from moe_dist.moe.merged_linear import OWN_MERGE_COST, merged_linear
from moe_dist.moe.on_device import count_ids
from moe_dist.moe.routing import Routing

MERGE_COST = 4.0
"""What a multiply-add of a merge costs, in multiply-adds of a product with many tokens: it reads a
weight for a few of them, so memory decides. Measured with 768 x 3072 on one core of a Xeon."""


@dataclass(frozen=True)
class Merges:
    """How one layer's experts come together for G groups of tokens.

    Args:
        by_linear: for each linear layer of the FFN ("in", "gate" if it is gated, "out") a `Routing`
            whose rows are groups: (G, K) expert ids and float32 weights, (G, E) logits.
        group_T: (T,) int64, the group of each token.
        real_G: (G,) bool, False for groups of padding alone; None if there are none.
    """

    by_linear: Mapping[str, Routing]
    group_T: Tensor
    real_G: Tensor | None = None

    def joined(self) -> Merges:
        """Make groups that merge alike one, unless each learns its weights from its own tokens."""
        routings = list(self.by_linear.values())
        num_groups = routings[0].expert_ids.shape[0]
        learns = torch.is_grad_enabled() and any(
            one.expert_weights.requires_grad for one in routings
        )
        if num_groups == 1 or learns:
            return self
        rows = [
            value.double() for one in routings for value in (one.expert_ids, one.expert_weights)
        ]
        _, inverse_G = torch.unique(torch.cat(rows, dim=1), dim=0, return_inverse=True)
        num_unlike = int(inverse_G.max()) + 1
        if num_unlike == num_groups:
            return self
        # Of the groups that are alike, any will do.
        chosen_G = inverse_G.new_zeros(num_unlike)
        chosen_G[inverse_G] = torch.arange(num_groups, device=inverse_G.device)
        by_linear = {
            name: replace(
                one,
                expert_ids=one.expert_ids[chosen_G],
                expert_weights=one.expert_weights[chosen_G],
                logits=None,
            )
            for name, one in self.by_linear.items()
        }
        return Merges(by_linear, inverse_G[self.group_T])


def linear_names(gated: bool) -> tuple[str, ...]:
    """Name the linear layers of an FFN, as `Merges` does."""
    return ("in", "gate", "out") if gated else ("in", "out")


def applying_is_cheaper(
    num_tokens: int, num_groups: int, top_k: int, num_used: int | None = None
) -> bool:
    """Whether K products for each token cost less than a merge for each group and one product.

    `num_used` is how many experts all groups use together; K where it is not given.
    """
    num_merged = min(num_used or top_k, OWN_MERGE_COST * top_k)
    return num_tokens * top_k <= num_tokens + MERGE_COST * num_merged * num_groups


def merge_experts(experts: Experts, hidden_TD: Tensor, merges: Merges) -> Tensor:
    """Apply to each token the merge of its group's experts: (T, D), in `compute_dtype`.

    Where the groups have few tokens the K experts are applied instead, which gives the same.
    """
    dtype = compute_dtype(hidden_TD)
    groups = TokenGroups.of(merges.joined())

    def linear(rows_TI: Tensor, name: str) -> Tensor:
        weight, bias = getattr(experts, f"w_{name}"), getattr(experts, f"b_{name}")
        routing = groups.by_linear[name]
        if weight is None:
            empty_TO = rows_TI.new_zeros(rows_TI.shape[0], experts.d_model)
            return empty_TO if bias is None else groups.spread(_merged_bias(bias, routing), dtype)
        ids_GK, num_used = routing.expert_ids, groups.num_used[name]
        if applying_is_cheaper(len(rows_TI), groups.num_filled, ids_GK.shape[1], num_used):
            return _apply_experts(rows_TI, weight, bias, routing, groups.group_T)
        out_TO = merged_linear(rows_TI, weight, ids_GK, routing.expert_weights, groups.sizes)
        if bias is None:
            return out_TO
        return out_TO + groups.spread(_merged_bias(bias, routing), dtype)

    rows_TD = groups.sorted_rows(hidden_TD.to(dtype))
    if experts.w_in is None:
        return groups.in_order(linear(rows_TD, "out"))
    hidden_TF = linear(rows_TD, "in")
    if experts.gated:
        hidden_TF = experts.activation(linear(rows_TD, "gate")) * hidden_TF
    else:
        hidden_TF = experts.activation(hidden_TF)
    if experts.dropout:
        hidden_TF = F.dropout(hidden_TF, experts.dropout, experts.training)
    return groups.in_order(linear(hidden_TF, "out"))


def merged_parameters(experts: Experts, weights_E: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge an FFN once, by each linear layer's (E,) weights: parameters without the E axis."""
    return {
        name: torch.tensordot(weights_E[name.partition("_")[2]].to(parameter), parameter, dims=1)
        for name, parameter in experts.named_parameters(recurse=False)
    }


def stacked_merges(
    stacks: Mapping[str, Tensor], merges: Merges, *, first_expert: int = 0
) -> dict[str, Tensor]:
    """Merge whole parameters for every group: what some consecutive experts add to each merge.

    For few groups, such as tasks: G weights of a whole FFN lie in memory.

    Args:
        stacks: (L, ...) parameters of L experts by name (w_in, b_in, ...).
        merges: of all experts.
        first_expert: the number of the first of the L.

    Returns:
        (G, ...) by the same names, in the parameters' dtype.
    """
    found = {}
    for name, stack in stacks.items():
        routing = merges.by_linear[name.partition("_")[2]]
        weights_GK = routing.expert_weights.to(stack.dtype)
        places_GK = routing.expert_ids - first_expert
        is_here_GK = (places_GK >= 0) & (places_GK < len(stack))
        weights_GL = weights_GK.new_zeros(len(weights_GK), len(stack)).scatter_add(
            1, places_GK.clamp(0, len(stack) - 1), weights_GK * is_here_GK
        )
        with torch.autocast(stack.device.type, enabled=False):
            found[name] = (weights_GL @ stack.flatten(1)).view(-1, *stack.shape[1:])
    return found


@dataclass(frozen=True)
class TokenGroups:
    """Tokens sorted by group, and the way back.

    Args:
        by_linear: as in `Merges`.
        group_T: groups of the sorted tokens.
        sizes: tokens of each group, on the host.
        num_used: by linear layer, how many experts all groups use together.
        order_T: where each sorted token was; None if they were sorted.
    """

    by_linear: Mapping[str, Routing]
    group_T: Tensor
    sizes: list[int]
    num_used: Mapping[str, int]
    order_T: Tensor | None

    @classmethod
    def of(cls, merges: Merges) -> TokenGroups:
        """Sort the tokens of a layer."""
        by_linear, group_T = merges.by_linear, merges.group_T
        num_groups = next(iter(by_linear.values())).expert_ids.shape[0]
        ids = [routing.expert_ids.flatten() for routing in by_linear.values()]
        is_unsorted = (group_T[1:] < group_T[:-1]).any().view(1)
        # An accelerator is read once for all that the host must know of a layer.
        facts = torch.cat([is_unsorted, count_ids(group_T, num_groups), *ids]).tolist()
        order_T = None
        if facts[0]:
            order_T = group_T.argsort(stable=True)
            group_T = group_T[order_T]
        num_used, start = {}, 1 + num_groups
        for name, own in zip(by_linear, ids, strict=True):
            num_used[name] = len(set(facts[start : start + len(own)]))
            start += len(own)
        return cls(by_linear, group_T, facts[1 : 1 + num_groups], num_used, order_T)

    @property
    def num_filled(self) -> int:
        """Count the groups that have tokens."""
        return sum(size > 0 for size in self.sizes)

    def sorted_rows(self, rows_TD: Tensor) -> Tensor:
        """Sort rows by group."""
        return rows_TD if self.order_T is None else rows_TD.index_select(0, self.order_T)

    def in_order(self, rows_TD: Tensor) -> Tensor:
        """Undo `sorted_rows`."""
        if self.order_T is None:
            return rows_TD
        places_T = torch.empty_like(self.order_T)
        places_T[self.order_T] = torch.arange(len(places_T), device=places_T.device)
        return rows_TD.index_select(0, places_T)

    def spread(self, bias_GO: Tensor, dtype: torch.dtype) -> Tensor:
        """Give each sorted token its group's row."""
        return bias_GO.to(dtype).index_select(0, self.group_T)


def _merged_bias(bias_EO: Tensor, routing: Routing) -> Tensor:
    weights_GK = routing.expert_weights.to(bias_EO.dtype)
    weights_GE = weights_GK.new_zeros(len(weights_GK), len(bias_EO))
    with torch.autocast(bias_EO.device.type, enabled=False):
        return weights_GE.scatter_add(1, routing.expert_ids, weights_GK) @ bias_EO


def _apply_experts(
    rows_TI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, routing: Routing, group_T: Tensor
) -> Tensor:
    """Give what the merge gives, with K products for each token."""
    ids_TK = routing.expert_ids[group_T]
    weights_TK = routing.expert_weights.index_select(0, group_T)
    order = sort_slots(ids_TK, weight_EOI.shape[0])
    weight_EOI = weight_EOI.to(rows_TI.dtype)
    bias_EO = None if bias_EO is None else bias_EO.to(rows_TI.dtype)
    rows_SI = permute(rows_TI, order)
    on_device = can_use_grouped_mm(rows_SI, weight_EOI)
    own = group_rows(order.tokens_per_expert_E, rows_SI, on_device=on_device)
    out_SO = grouped_linear(rows_SI, weight_EOI, bias_EO, own)
    return unpermute(out_SO, Routing(ids_TK, weights_TK), order)
