"""Which rank holds which experts, so that ranks have alike much to multiply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

Order = tuple[int, ...]
"""All experts of a layer: the first rank's, then the second one's, and so on, equally many each."""


def plain_order(num_experts: int) -> Order:
    """Return the experts in the order of their numbers."""
    return tuple(range(num_experts))


def even_order(loads: Sequence[float], num_ranks: int) -> Order:
    """Spread a layer's experts so that no rank has much more to do than another.

    The busiest expert goes first, each to the rank that has the least so far among those with room.

    Args:
        loads: tokens of each expert, or shares of them.
        num_ranks: divides the number of experts.

    Returns:
        The order; the plain one where this does not relieve the busiest rank.
    """
    room = len(loads) // num_ranks
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert)):
        free = [rank for rank in range(num_ranks) if len(held[rank]) < room]
        least = min(free, key=lambda rank: (sum(loads[own] for own in held[rank]), rank))
        held[least].append(expert)
    found = tuple(expert for own in held for expert in sorted(own))
    plain = plain_order(len(loads))
    if largest_share(loads, found, num_ranks) < largest_share(loads, plain, num_ranks):
        return found
    return plain


def largest_share(loads: Sequence[float], order: Order, num_ranks: int) -> float:
    """Give the busiest rank's share of all tokens; an even one's where there are none."""
    room, total = len(loads) // num_ranks, sum(loads)
    if total <= 0:
        return 1 / num_ranks
    starts = range(0, len(order), room)
    return max(sum(loads[expert] for expert in order[start : start + room]) for start in starts) / (
        total
    )


def order_of(tensor: Tensor) -> Order | None:
    """Give the order that a rank's slice of experts was cut by; None for the plain one."""
    order: Order | None = getattr(tensor, "expert_order", None)
    return order


def places(order: Iterable[int]) -> list[int]:
    """Tell where each expert lies in an order."""
    experts = list(order)
    return sorted(range(len(experts)), key=experts.__getitem__)
