"""How many trials fit at once, and what is said when none does."""

from __future__ import annotations

import pytest

from moe_dist.errors import ClusterError
from moe_dist.search.tune import find_room
from moe_dist.workers.cluster_capacity import Capacity, Node


def cluster(*nodes: tuple[float, float]) -> Capacity:
    return Capacity(
        tuple(
            Node(f"n{i}", f"10.0.0.{i}", "", cpus, gpus, 8.0, cpus, gpus)
            for i, (cpus, gpus) in enumerate(nodes, start=1)
        )
    )


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "trials"),
    [
        ([(2, 0)], 1, 1, 2),
        ([(2, 0)], 2, 1, 1),
        ([(4, 0), (3, 0)], 1, 2, 3),
        ([(4, 0), (3, 0)], 3, 1, 2),
        ([(8, 0)], (2, 4), 1, 4),
    ],
)
def test_concurrency_follows_from_the_slots(
    nodes: list[tuple[float, float]], workers: int | tuple[int, int], cpus: int, trials: int
) -> None:
    room = find_room(cluster(*nodes), workers, cpus, use_gpu=False)
    assert room.num_concurrent == trials
    assert room.in_place is (workers == 1)


def test_gpus_count_where_trials_take_them() -> None:
    room = find_room(cluster((16, 2)), 1, 1, use_gpu=None)
    assert room.num_concurrent == 2 and room.placement.need.gpus == 1
    assert str(room) == "2 trials at a time, each of 1 worker with 1 CPU and 1 GPU"


def test_fewer_at_a_time_where_the_recipe_says_so() -> None:
    assert find_room(cluster((8, 0)), 1, 1, use_gpu=False, most=3).num_concurrent == 3


def test_a_sweep_that_cannot_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ClusterError) as caught:
        find_room(cluster((2, 0)), 4, 1, use_gpu=False)
    assert "parallel.num_workers=4 x parallel.cpus_per_worker=1 = 4 CPUs" in caught.value.message
    assert "has 2" in caught.value.message and caught.value.remedy
