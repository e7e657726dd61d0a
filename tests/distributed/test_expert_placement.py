"""Experts placed by load: even ranks, equally many experts on each, and no move without need."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moe_dist.distributed.expert_placement import even_order, largest_share, places, plain_order


def test_two_busy_experts_part() -> None:
    """A rank of the plain order has 72 % of the tokens; the best that can be is 52 %."""
    loads = [0.16, 0.12, 0.40, 0.32]
    assert even_order(loads, 2) == (1, 2, 0, 3)
    assert largest_share(loads, plain_order(4), 2) == pytest.approx(0.72)
    assert largest_share(loads, even_order(loads, 2), 2) == pytest.approx(0.52)


@pytest.mark.parametrize("loads", [[1, 1, 1, 1], [0, 0, 0, 0], [5, 0, 5, 0], [1, 0, 0, 0]])
def test_nothing_moves_where_no_rank_is_relieved(loads: list[float]) -> None:
    assert even_order(loads, 2) == (0, 1, 2, 3)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_every_rank_has_as_many_and_none_is_far_from_the_best(num_ranks: int) -> None:
    rng = np.random.default_rng(num_ranks)
    for _ in range(20):
        loads = rng.dirichlet([0.5] * 8).tolist()
        order = even_order(loads, num_ranks)
        assert sorted(order) == list(range(8))
        found = largest_share(loads, order, num_ranks)
        assert found <= largest_share(loads, plain_order(8), num_ranks)
        if num_ranks == 2:
            halves = itertools.combinations(range(8), 4)
            best = min(
                max(sum(loads[i] for i in own), 1 - sum(loads[i] for i in own)) for own in halves
            )
            assert found <= best + max(loads) / 2


def test_places_undo_an_order() -> None:
    order = (3, 0, 2, 1)
    assert [order[place] for place in places(order)] == [0, 1, 2, 3]
    assert places(order) == [1, 3, 2, 0]
