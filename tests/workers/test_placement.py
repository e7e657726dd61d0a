"""Wishes for workers against clusters of all shapes, and the wait for worker slots, without Ray."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.errors import ClusterError
from moe_dist.workers import cluster_capacity as capacity_module
from moe_dist.workers.cluster_capacity import Capacity, Node, NodeKind, WorkerNeed, grown_capacity
from moe_dist.workers.placement import Placement, choose_placement
from moe_dist.workers.placement_wait import PlacementWait


def node(
    cpus: float, gpus: float = 0, *, free: float | None = None, kind: str = "", name: str = "n"
) -> Node:
    free_cpus = cpus if free is None else free
    return Node(name, f"10.0.0.{name}", kind, cpus, gpus, 8.0, free_cpus, gpus)


def cluster(*cpus: float) -> Capacity:
    return Capacity(tuple(node(count, name=str(i)) for i, count in enumerate(cpus)))


def test_a_wish_that_fits() -> None:
    assert choose_placement(cluster(2, 2), 4, 1, None) == Placement(4, 4, WorkerNeed(1))
    assert choose_placement(cluster(2, 2), (2, 8), 2, None) == Placement(2, 8, WorkerNeed(2))


def test_more_cpus_than_there_are() -> None:
    with pytest.raises(ClusterError) as caught:
        choose_placement(cluster(2, 4), 8, 2, None)
    assert str(caught.value.message) == (
        "parallel.num_workers=8 x parallel.cpus_per_worker=2 = 16 CPUs, and the Ray cluster has 6 "
        "(10.0.0.0: 2 CPUs; 10.0.0.1: 4 CPUs)"
    )
    assert caught.value.remedy == (
        "Set parallel.num_workers to 3 or less, reserve fewer CPUs for each worker "
        "(parallel.cpus_per_worker), or add nodes."
    )
    # Of one CPU each, as `auto` has it here, nobody can reserve fewer.
    with pytest.raises(ClusterError, match=r"=8 x .*cpus_per_worker=1 = 8 CPUs") as caught:
        choose_placement(cluster(2, 4), 8, 1, None)
    assert caught.value.remedy == "Set parallel.num_workers to 6 or less, or add nodes."


def test_a_worker_larger_than_any_node() -> None:
    with pytest.raises(ClusterError, match="needs 1 slots of 6 CPUs, each on one node") as caught:
        choose_placement(cluster(4, 4), 1, 6, None)
    assert caught.value.remedy == (
        "Reserve fewer CPUs for each worker (parallel.cpus_per_worker), or add larger nodes."
    )


def test_workers_that_fit_in_sum_and_not_on_nodes() -> None:
    with pytest.raises(ClusterError, match="3 slots of 2 CPUs, each on one node, and 2 fit"):
        choose_placement(cluster(3, 3), 3, 2, None)


def test_gpus() -> None:
    gpus = Capacity((node(8, 2, name="0"), node(8, 2, name="1")))
    assert choose_placement(gpus, 4, 1, None).need == WorkerNeed(1, 1)
    assert choose_placement(gpus, 5, 1, None).need == WorkerNeed(1, 0)
    assert choose_placement(gpus, 4, 1, False).need == WorkerNeed(1, 0)
    assert choose_placement(gpus, (4, 6), 1, None).need == WorkerNeed(1, 1)
    with pytest.raises(ClusterError, match="needs 5 GPUs, and the Ray cluster has 4") as caught:
        choose_placement(gpus, 5, 1, True)
    assert "use_gpu=false" in caught.value.remedy


def test_gpus_without_the_cpus_beside_them() -> None:
    lopsided = Capacity((node(1, 4, name="0"), node(8, 0, name="1")))
    with pytest.raises(ClusterError, match="2 slots of 1 CPU and 1 GPU, each on one node, and 1"):
        choose_placement(lopsided, 2, 1, True)


def test_least_of_an_elastic_wish_counts() -> None:
    assert choose_placement(cluster(2), (2, 64), 1, None).most == 64
    with pytest.raises(ClusterError, match=r"=\[3, 4\] asks for at least 3 x .* = 3 CPUs"):
        choose_placement(cluster(2), (3, 4), 1, None)


KINDS = {
    "head": NodeKind("head", 4, 0, 0),
    "small": NodeKind("small", 4, 0, 10),
    "large": NodeKind("large", 16, 1, 2),
}


def test_an_autoscaler_may_add_nodes_up_to_its_bounds() -> None:
    nodes = (node(4, kind="head", name="0"), node(4, kind="small", name="1"))
    grown = grown_capacity(nodes, KINDS, max_workers=4)
    need = WorkerNeed(4)
    assert grown.max_added == 3
    assert [kind.max_nodes for kind in grown.kinds or ()] == [0, 9, 2]
    assert grown.present_slots(need) == 2
    assert grown.most_slots(need) == 2 + 2 * 4 + 1
    assert grown.most_slots(WorkerNeed(1, 1)) == 2
    assert choose_placement(grown, 11, 4, None).most == 11
    with pytest.raises(ClusterError, match="= 48 CPUs, and the Ray cluster can grow to 44 at most"):
        choose_placement(grown, 12, 4, None)
    with pytest.raises(ClusterError, match="needs 1 slots of 17 CPUs"):
        choose_placement(grown, 1, 17, None)


def test_an_autoscaler_that_does_not_tell_its_bounds_is_waited_for() -> None:
    unknown = Capacity((node(4, kind="pod"),), kinds=None)
    assert unknown.most_slots(WorkerNeed(1)) == math.inf
    assert choose_placement(unknown, 100, 4, None).need == WorkerNeed(4)
    assert choose_placement(unknown, 100, 4, True).need == WorkerNeed(4, 1)


def test_launcher_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    content: dict[str, Any] = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 4}},
            "gpu": {"resources": {"CPU": 8, "GPU": 1}, "min_workers": 0, "max_workers": 2},
            "cpu": {"resources": {"CPU": 8}},
        },
    }
    path.write_text(yaml.safe_dump(content))
    assert capacity_module._read_launcher(path) == (
        {
            "head": NodeKind("head", 4, 0, 0),
            "gpu": NodeKind("gpu", 8, 1, 2),
            "cpu": NodeKind("cpu", 8, 0, 3),
        },
        3,
    )
    for broken in ("", "[", "max_workers: 3", "available_node_types: {a: {}}"):
        path.write_text(broken)
        assert capacity_module._read_launcher(path) is None
    assert capacity_module._read_launcher(tmp_path / "missing") is None


def busy(*free: float) -> Capacity:
    return Capacity(tuple(node(2, free=count, name=str(i)) for i, count in enumerate(free)))


def test_a_wait_is_told_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    wait = PlacementWait(Placement(4, 4, WorkerNeed(1)), wait_s=30)
    for now_s in (0, 2, 4):
        wait.look(now_s, busy(2, 1), placed=False)
    assert not caplog.messages
    for now_s in (6, 8, 14, 16, 18):
        wait.look(now_s, busy(2, 1), placed=False)
    assert len(caplog.messages) == 2
    assert caplog.messages[0] == (
        "waiting for worker slots since 6 s (at most 30 s): 4 workers of 1 CPU each, and 3 fit now "
        "(free: 10.0.0.0: 2 CPUs; 10.0.0.1: 1 CPU)"
    )
    with pytest.raises(ClusterError, match=r"waited 31 s for worker slots \(parallel.wait_s=30\)"):
        wait.look(31, busy(2, 1), placed=False)


def test_a_run_and_a_start_are_no_wait(caplog: pytest.LogCaptureFixture) -> None:
    wait = PlacementWait(Placement(4, 4, WorkerNeed(1)), wait_s=10)
    for now_s in range(0, 100, 2):
        wait.look(now_s, busy(0, 0), placed=True)
        wait.look(now_s, busy(2, 2), placed=False)
    assert not caplog.messages


def test_every_wait_has_its_own_time() -> None:
    wait = PlacementWait(Placement(4, 4, WorkerNeed(1)), wait_s=10)
    for now_s in (0, 8):
        wait.look(now_s, busy(1, 1), placed=False)
    wait.look(9, busy(0, 0), placed=True)
    for now_s in (12, 20):
        wait.look(now_s, busy(1, 1), placed=False)
    with pytest.raises(ClusterError):
        wait.look(23, busy(1, 1), placed=False)


def test_an_elastic_job_takes_what_there_is() -> None:
    wait = PlacementWait(Placement(2, 8, WorkerNeed(1)), wait_s=10)
    for now_s in (0, 20):
        wait.look(now_s, busy(2, 2), placed=False)
    wait.look(30, busy(1, 0), placed=False)
    with pytest.raises(ClusterError, match="4 workers of 1 CPU each, and 1 fit now"):
        wait.look(41, busy(1, 0), placed=False)
