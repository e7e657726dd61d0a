"""Assignments are the cheapest there are, and clusters the tightest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_dist.conversion.clustering import balanced_assignment, balanced_clusters, squared_distance


def total_cost(cost_NC: Tensor, cluster_N: Tensor) -> float:
    return float(cost_NC[torch.arange(len(cost_NC)), cluster_N].sum())


def all_assignments(sizes: list[int]) -> list[Tensor]:
    """Every way to fill clusters of these sizes."""
    places = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    return [torch.tensor(order) for order in sorted(set(itertools.permutations(places)))]


@pytest.mark.parametrize("sizes", [[3, 3], [2, 2, 2], [1, 2, 4], [0, 3, 3], [1, 1, 1, 1, 3]])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_assignment_is_cheaper(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost_NC = torch.randn(sum(sizes), len(sizes), generator=generator).double()
    if seed % 2:
        # Everyone wants the same cluster.
        cost_NC[:, 0] -= 5.0
    found = balanced_assignment(cost_NC, sizes)
    assert found.bincount(minlength=len(sizes)).tolist() == sizes
    best = min(total_cost(cost_NC, other) for other in all_assignments(sizes))
    assert total_cost(cost_NC, found) == pytest.approx(best)


def test_a_large_assignment_equals_another_solver() -> None:
    from scipy.optimize import linear_sum_assignment

    generator = torch.Generator().manual_seed(0)
    cost_NC = torch.rand(120, 6, generator=generator).double() ** 3
    found = balanced_assignment(cost_NC, [20] * 6)
    rows, columns = linear_sum_assignment(cost_NC.repeat_interleave(20, dim=1).numpy())
    assert total_cost(cost_NC, found) == pytest.approx(
        float(cost_NC[torch.from_numpy(rows), torch.from_numpy(columns // 20)].sum())
    )


def test_equal_costs_and_wrong_sizes() -> None:
    found = balanced_assignment(torch.zeros(6, 3), [2, 2, 2])
    assert found.bincount().tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="do not hold 6 items"):
        balanced_assignment(torch.zeros(6, 3), [2, 2, 3])


@pytest.mark.parametrize("seed", range(4))
def test_no_other_clusters_are_tighter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).repeat(4, 1)
    rows = (centers + torch.randn(8, 2, generator=generator)).double()
    gram_NN = rows @ rows.T
    found = balanced_clusters(gram_NN, 2, generator=generator)
    assert found.bincount().tolist() == [4, 4]
    best = min(squared_distance(gram_NN, other) for other in all_assignments([4, 4]))
    assert squared_distance(gram_NN, found) == pytest.approx(best)


def test_the_distance_by_hand() -> None:
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]])
    distance = squared_distance(rows @ rows.T, torch.tensor([1, 1, 0]))
    assert distance == pytest.approx(2.0)


def test_sizes_that_do_not_divide_and_items_that_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 3, generator=generator)
    sizes = balanced_clusters(rows @ rows.T, 4, generator=generator).bincount()
    assert sorted(sizes.tolist()) == [2, 3, 3, 3]
    alike = balanced_clusters(torch.ones(8, 8), 4, generator=generator)
    assert alike.bincount().tolist() == [2, 2, 2, 2]
    nothing = balanced_clusters(torch.zeros(8, 8), 4, generator=generator)
    assert nothing.bincount().tolist() == [2, 2, 2, 2]


def test_a_seed_decides() -> None:
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    first, again = (
        balanced_clusters(rows @ rows.T, 4, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(first, again)
