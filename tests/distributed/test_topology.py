"""Expert groups over ranks and nodes, and the ep_size that fits a world of another size."""

from __future__ import annotations

import pytest

from moe_dist.distributed.topology import Topology, fitting_ep_size, list_groups


def lay_out(workers_on_nodes: list[tuple[str, int]], ep_size: int) -> Topology:
    """Number the workers node by node, as Ray Train does."""
    return Topology(tuple(node for node, count in workers_on_nodes for _ in range(count)), ep_size)


@pytest.mark.parametrize(
    ("world_size", "num_experts", "wished", "expected"),
    [
        (4, 8, 4, 4),
        (4, 8, 2, 2),
        (3, 8, 2, 1),
        (1, 8, 8, 1),
        (6, 8, 4, 2),
        (6, 6, 4, 3),
        (8, 6, 4, 2),
        (4, 1, 4, 1),
        (2, 8, 4, 2),
    ],
)
def test_ep_size_falls_to_the_largest_that_divides_both(
    world_size: int, num_experts: int, wished: int, expected: int
) -> None:
    assert fitting_ep_size(world_size, num_experts, wished) == expected


def test_ep_size_against_all_divisors() -> None:
    for world_size in range(1, 17):
        for num_experts in range(1, 17):
            for wished in range(1, 17):
                fitting = [
                    size
                    for size in range(1, wished + 1)
                    if world_size % size == 0 and num_experts % size == 0
                ]
                assert fitting_ep_size(world_size, num_experts, wished) == max(fitting)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_ep_size_of_nothing(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        fitting_ep_size(*numbers)


def test_groups_are_those_of_deepspeed() -> None:
    topology = lay_out([("a", 4), ("b", 4)], ep_size=4)
    assert topology.world_size == 8 and topology.expert_data_parallel_size == 2
    assert topology.expert_groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert topology.expert_data_parallel_groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert topology.crossing_groups == () and topology.describe_crossing() == ""


def test_every_rank_is_in_one_group_of_each_sort() -> None:
    topology = lay_out([("a", 3), ("b", 5), ("c", 4)], ep_size=2)
    for groups in (topology.expert_groups, topology.expert_data_parallel_groups):
        assert sorted(rank for group in groups for rank in group) == list(range(12))


def test_an_odd_node_makes_a_group_cross() -> None:
    topology = lay_out([("a", 3), ("b", 3)], ep_size=2)
    assert topology.crossing_groups == ((2, 3),)
    words = topology.describe_crossing()
    assert "1 of 3 expert groups cross nodes (ranks 2-3; 3 + 3 workers" in words
    assert "multiple of parallel.ep_size=2" in words
    assert lay_out([("a", 3), ("b", 3)], ep_size=1).crossing_groups == ()
    assert lay_out([("a", 3), ("b", 3)], ep_size=6).crossing_groups == ((0, 1, 2, 3, 4, 5),)


def test_ranks_of_one_node_need_not_be_consecutive() -> None:
    assert Topology(("a", "b", "a", "b"), 2).crossing_groups == ((0, 1), (2, 3))


def test_groups_in_words() -> None:
    assert list_groups([(0, 1, 2), (3, 4, 5)]) == "0-2, 3-5"
    assert list_groups([(0, 2), (1, 3)]) == "0+2, 1+3"
    assert list_groups([(0,), (1,), (2,)], most=2) == "0, 1, ..."
