"""Dispatch to experts that live on other ranks.

Shapes: T tokens, D model, E experts, K active experts; S = T*K slots of this rank's tokens, R rows
that it receives from other ranks, G ranks of the group, L = E / G experts on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.exchange import (
    ReceiveHomeward,
    ReceiveOutward,
    RowExchange,
    SendHomeward,
    SendOutward,
    Traffic,
    plan_route,
)
from moe_dist.distributed.mailboxes import Mailboxes
from moe_dist.distributed.position import collective
from moe_dist.moe import Experts, Routing
from moe_dist.moe.dispatch import permute, sort_slots, unpermute
from moe_dist.moe.experts import compute_dtype


class AllToAllDispatcher:
    """Send each token to the ranks of its experts and bring the results back.

    Every rank of the group holds E / G experts and may have another number of tokens, zero
    included: counts are exchanged first, nothing is padded; what `Routing.kept` leaves out is not
    sent. Tokens whose experts are here never travel; they are multiplied while the others
    do, one half on the way out and one on the way home. All ranks of the group must call it
    together, equally often. Where `mailboxes` are set, on all ranks, rows go through them.

    Args:
        group: the expert-parallel process group.
        places: where each expert lies among those of all ranks, one rank's behind the other's; in
            the order of their numbers if None.
    """

    def __init__(self, group: dist.ProcessGroup, places: Sequence[int] | None = None) -> None:
        self.group = group
        self._places = None if places is None else torch.tensor(places)
        self.traffic = Traffic()
        self.mailboxes: Mailboxes | None = None

    def __call__(self, hidden_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Apply the chosen experts, numbered globally, to this rank's tokens.

        `experts` is this rank's slice; the (T, D) sums are in `compute_dtype` of the input.
        """
        if self._places is not None:
            self._places = self._places.to(routing.expert_ids.device)
            routing = replace(routing, expert_ids=self._places[routing.expert_ids])
        num_ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        num_experts = num_ranks * experts.num_experts
        order = sort_slots(routing.expert_ids, num_experts, routing.kept)
        # The experts would cast to this dtype anyway; before the exchange it may halve the bytes.
        dtype = compute_dtype(hidden_TD)
        rows_SD = permute(hidden_TD.to(dtype), order)
        sent_GL, received_GL = self._exchange_counts(order.tokens_per_expert_E.view(num_ranks, -1))
        route = plan_route(sent_GL, received_GL, rank, self.group, self.traffic, self.mailboxes)
        first_counts, second_counts = _halves(sent_GL[rank])
        received_counts = torch.tensor(received_GL)
        received_counts[rank] = 0
        apply = experts.in_chunks(dtype, num_chunks=3)

        outward, homeward = RowExchange(route), RowExchange(route)
        first, second, received_RD = SendOutward.apply(rows_SD, outward, sum(first_counts))
        first = apply(first, torch.tensor(first_counts))
        received_RD = ReceiveOutward.apply(received_RD, outward)
        received_RD = apply(received_RD, received_counts.sum(0))
        results_SD = SendHomeward.apply(received_RD, homeward)
        second = apply(second, torch.tensor(second_counts))
        results_SD = ReceiveHomeward.apply(results_SD, first, second, homeward)
        return unpermute(results_SD, routing, order)

    def _exchange_counts(self, sent_GL: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        received_GL = torch.empty_like(sent_GL)
        with collective("all-to-all of expert counts"):
            dist.all_to_all_single(received_GL, sent_GL, group=self.group)
            # Message sizes must be known on the host: the one synchronisation of a layer.
            sent, received = torch.stack([sent_GL, received_GL]).tolist()
        return sent, received


def _halves(counts: list[int]) -> tuple[list[int], list[int]]:
    """Cut grouped rows into two equal parts, and count each expert's rows in both."""
    left = sum(counts) // 2
    first = []
    for count in counts:
        first.append(min(count, left))
        left -= first[-1]
    return first, [count - taken for count, taken in zip(counts, first, strict=True)]
