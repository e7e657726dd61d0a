"""Groups of given sizes: exact assignment, and k-means on a matrix of inner products.

Shapes: N items, C clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_ITERATIONS = 50
NUM_STARTS = 4


def balanced_clusters(
    gram_NN: Tensor,
    num_clusters: int,
    *,
    generator: torch.Generator,
    num_starts: int = NUM_STARTS,
) -> Tensor:
    """Group items into clusters of equal size, so that they are near their clusters' means.

    K-means whose assignments are exact for the given sizes, so that no step makes the sum of
    squared distances larger; the best of several k-means++ starts.

    Args:
        gram_NN: inner products of all pairs of items; symmetric, positive semidefinite.
        num_clusters: C; sizes differ by one at most.
        generator: draws the starts.
        num_starts: how many.

    Returns:
        (N,) int64, the cluster of each item.
    """
    gram = gram_NN.double().cpu().numpy()
    num_items = len(gram)
    if not num_items:
        return torch.zeros(0, dtype=torch.int64)
    sizes = [(num_items + index) // num_clusters for index in range(num_clusters)]
    best: Tensor | None = None
    least = float("inf")
    for _ in range(num_starts if num_items > num_clusters else 1):
        seeds = _spread_seeds(gram, num_clusters, generator)
        cost_NC = np.diag(gram)[:, None] + np.diag(gram)[seeds] - 2 * gram[:, seeds]
        cluster_N = balanced_assignment(torch.from_numpy(cost_NC), sizes)
        for _ in range(MAX_ITERATIONS):
            cost_NC = _distances(gram, cluster_N.numpy(), num_clusters)
            changed_N = balanced_assignment(torch.from_numpy(cost_NC), sizes)
            if torch.equal(changed_N, cluster_N):
                break
            cluster_N = changed_N
        total = squared_distance(gram_NN, cluster_N)
        if total < least:
            best, least = cluster_N, total
    assert best is not None
    return best


def squared_distance(gram_NN: Tensor, cluster_N: Tensor) -> float:
    """Sum the squared distances of all items to their clusters' means, from inner products."""
    gram = gram_NN.double()
    total = float(gram.diagonal().sum())
    for cluster in cluster_N.unique():
        own = cluster_N == cluster
        total -= float(gram[own][:, own].sum()) / int(own.sum())
    return total


def balanced_assignment(cost_NC: Tensor, sizes: Sequence[int]) -> Tensor:
    """Assign items to clusters of given sizes at the least total cost, exactly.

    Starts with everyone in the cheapest cluster, and moves items along the cheapest chain of
    clusters from a crowded to a vacant one, until all sizes are met (successive shortest paths).

    Args:
        cost_NC: the cost of each item in each cluster.
        sizes: of the clusters; they sum to N.

    Returns:
        (N,) int64, the cluster of each item.

    Raises:
        ValueError: if the sizes do not sum to N.
    """
    cost: NDArray[np.float64] = cost_NC.double().cpu().numpy()
    num_items, num_clusters = cost.shape
    if sum(sizes) != num_items or len(sizes) != num_clusters:
        raise ValueError(f"sizes {list(sizes)} do not hold {num_items} items")
    wanted = np.asarray(sizes)
    cluster_N = cost.argmin(axis=1) if num_items else np.zeros(0, np.int64)
    counts = np.bincount(cluster_N, minlength=num_clusters)
    # The cheapest move from one cluster to another, and who makes it.
    step_CC = np.full((num_clusters, num_clusters), np.inf)
    mover_CC = np.zeros((num_clusters, num_clusters), np.int64)

    def refresh(cluster: int) -> None:
        members = np.flatnonzero(cluster_N == cluster)
        step_CC[cluster] = np.inf
        if members.size:
            change = cost[members] - cost[members, cluster][:, None]
            cheapest = change.argmin(axis=0)
            mover_CC[cluster] = members[cheapest]
            step_CC[cluster] = change[cheapest, np.arange(num_clusters)]
            step_CC[cluster, cluster] = np.inf

    for cluster in range(num_clusters):
        refresh(cluster)
    while (counts > wanted).any():
        path = _cheapest_path(step_CC, counts > wanted, counts < wanted)
        for mover, target in [(mover_CC[here, there], there) for here, there in pairwise(path)]:
            cluster_N[mover] = target
        counts[path[0]] -= 1
        counts[path[-1]] += 1
        for cluster in path:
            refresh(cluster)
    return torch.from_numpy(cluster_N.astype(np.int64))


def _cheapest_path(
    step_CC: NDArray[np.float64], starts: NDArray[np.bool_], ends: NDArray[np.bool_]
) -> list[int]:
    """Bellman and Ford, since steps may save as well as cost."""
    num_clusters = len(step_CC)
    cost_C = np.where(starts, 0.0, np.inf)
    before_C = np.full(num_clusters, -1)
    finite = np.abs(step_CC[np.isfinite(step_CC)])
    # Rounding must not make a detour look cheaper for ever.
    tolerance = 1e-12 * float(finite.max(initial=1.0))
    for _ in range(num_clusters):
        through_CC = cost_C[:, None] + step_CC
        via_C = through_CC.argmin(axis=0)
        reached_C = through_CC[via_C, np.arange(num_clusters)]
        better_C = reached_C < cost_C - tolerance
        if not better_C.any():
            break
        cost_C = np.where(better_C, reached_C, cost_C)
        before_C = np.where(better_C, via_C, before_C)
    path = [int(np.where(ends, cost_C, np.inf).argmin())]
    while before_C[path[-1]] >= 0:
        path.append(int(before_C[path[-1]]))
        assert len(path) <= num_clusters, "assignments that are optimal so far have no cycle"
    return path[::-1]


def _spread_seeds(
    gram: NDArray[np.float64], num_clusters: int, generator: torch.Generator
) -> list[int]:
    """Draw items far from each other (k-means++)."""
    norms = np.diag(gram)
    seeds = [int(torch.randint(len(gram), (1,), generator=generator))]
    nearest_N = np.full(len(gram), np.inf)
    while len(seeds) < min(num_clusters, len(gram)):
        last = seeds[-1]
        nearest_N = np.minimum(nearest_N, norms + norms[last] - 2 * gram[:, last])
        chance_N = torch.from_numpy(nearest_N.clip(min=0.0))
        # Where all items are alike, any will do.
        chance_N = chance_N if float(chance_N.sum()) > 0 else torch.ones_like(chance_N)
        seeds.append(int(torch.multinomial(chance_N, 1, generator=generator)))
    return seeds + seeds[:1] * (num_clusters - len(seeds))


def _distances(
    gram: NDArray[np.float64], cluster_N: NDArray[np.int64], num_clusters: int
) -> NDArray[np.float64]:
    """Squared distance of each item to the mean of each cluster, from inner products alone."""
    member_NC = np.eye(num_clusters)[cluster_N]
    member_NC /= member_NC.sum(axis=0).clip(min=1.0)
    to_mean_NC = gram @ member_NC
    mean_norm_C = (member_NC * to_mean_NC).sum(axis=0)
    return np.diag(gram)[:, None] - 2 * to_mean_NC + mean_norm_C
