"""Which ranks share experts, which hold the same ones, and which of these groups cross nodes.

As DeepSpeed lays them out: an expert group is `ep_size` consecutive ranks, which together hold one
set of experts; an expert-data-parallel group is every `ep_size`-th rank, which hold the same ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd


def fitting_ep_size(world_size: int, num_experts: int, wished: int) -> int:
    """Find the expert parallel size for a number of workers that was not planned for.

    It is the wish where that divides both numbers; else the largest number below it that does. A
    number that is not positive is a ValueError.
    """
    if min(world_size, num_experts, wished) < 1:
        raise ValueError(
            f"world_size={world_size}, num_experts={num_experts} and wished={wished} must be "
            "positive"
        )
    common = gcd(world_size, num_experts)
    return next(size for size in range(wished, 0, -1) if common % size == 0)


@dataclass(frozen=True)
class Topology:
    """Ranks on nodes.

    Args:
        node_of_rank: for each rank what tells its node from others.
        ep_size: ranks that share one set of experts; it divides the number of ranks.
    """

    node_of_rank: tuple[Hashable, ...]
    ep_size: int

    @property
    def world_size(self) -> int:
        """Ranks in all; each of them also has its share of every batch (data parallel)."""
        return len(self.node_of_rank)

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that hold the same experts and average their gradients."""
        return self.world_size // self.ep_size

    @property
    def expert_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that share one set of experts, and send each other tokens in every layer."""
        return tuple(
            tuple(range(first, first + self.ep_size))
            for first in range(0, self.world_size, self.ep_size)
        )

    @property
    def expert_data_parallel_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same experts."""
        return tuple(
            tuple(range(first, self.world_size, self.ep_size)) for first in range(self.ep_size)
        )

    @property
    def crossing_groups(self) -> tuple[tuple[int, ...], ...]:
        """Expert groups whose ranks are not all on one node."""
        return tuple(
            group
            for group in self.expert_groups
            if len({self.node_of_rank[rank] for rank in group}) > 1
        )

    @property
    def workers_on_nodes(self) -> tuple[int, ...]:
        """Workers on each node, in the order of the ranks."""
        return tuple(len(list(ranks)) for _, ranks in groupby(self.node_of_rank))

    def describe_crossing(self) -> str:
        """Say which expert groups cross nodes, and what would keep them on one; else empty."""
        crossing = self.crossing_groups
        if not crossing:
            return ""
        counts = " + ".join(str(count) for count in self.workers_on_nodes)
        return (
            f"{len(crossing)} of {len(self.expert_groups)} expert groups cross nodes (ranks "
            f"{list_groups(crossing)}; {counts} workers on the nodes), so their tokens travel over "
            f"the network; a multiple of parallel.ep_size={self.ep_size} workers on each node, or "
            "a smaller ep_size, keeps them on one"
        )


def list_groups(groups: Sequence[Sequence[int]], *, most: int = 4) -> str:
    """Write groups of ranks in few words: `0-3, 4-7` or `0+2, 1+3`, `most` of them."""
    shown = ", ".join(_group(group) for group in groups[:most])
    return f"{shown}, ..." if len(groups) > most else shown


def _group(ranks: Sequence[int]) -> str:
    consecutive = len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]}-{ranks[-1]}" if consecutive else "+".join(str(rank) for rank in ranks)
