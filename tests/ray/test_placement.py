"""Wishes for workers, met by a real Ray cluster at once, later, or never.

The jobs are nested functions, which Ray sends by value: the workers know nothing of the tests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ClusterError
from moe_dist.workers.cluster_capacity import WorkerNeed, read_capacity
from moe_dist.workers.driver import run_on_workers
from moe_dist.workers.placement import Placement, plan_placement
from moe_dist.workers.placement_wait import is_placed
from moe_dist.workers.ray_session import RaySession, ray_session
from tests.ray.clusters import SmallCluster, small_cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallCluster]:
    pytest.importorskip("ray")
    with small_cluster(1, 2, temp_dir="/tmp/place-ray") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def session(cluster: SmallCluster) -> Iterator[RaySession]:
    with ray_session() as session:
        session.connect()
        yield session


def test_nodes_as_ray_knows_them(session: RaySession) -> None:
    capacity = read_capacity()
    assert sorted(node.cpus for node in capacity.nodes) == [1, 2]
    assert sorted(node.free_cpus for node in capacity.nodes) == [1, 2]
    assert all(node.kind == "" and node.memory_gib > 0.1 for node in capacity.nodes)
    assert capacity.most_slots(WorkerNeed(1)) == 3


def test_worker_slots_are_recognised(session: RaySession) -> None:
    import ray

    wish = Placement(2, 3, WorkerNeed(1))
    assert not is_placed(wish)
    group = ray.util.placement_group([{"CPU": 1}] * 2)
    try:
        assert group.wait(60)
        assert is_placed(wish) and is_placed(Placement(2, 2, WorkerNeed(1)))
        assert not is_placed(Placement(3, 3, WorkerNeed(1)))
        assert not is_placed(Placement(2, 2, WorkerNeed(2)))
    finally:
        ray.util.remove_placement_group(group)


def test_the_impossible_is_refused_at_once(session: RaySession) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"=64 x .*cpus_per_worker=2 = 128 CPUs.* has 3 ") as no:
        plan_placement(64, 2, None)
    assert "num_workers to 1 or less" in no.value.remedy
    with pytest.raises(ClusterError, match="needs 1 GPUs, and the Ray cluster has 0"):
        plan_placement(1, 1, True)
    with pytest.raises(ClusterError, match="1 slots of 3 CPUs, each on one node"):
        plan_placement(1, 3, None)
    assert time.monotonic() - started < 10


@pytest.fixture
def others(session: RaySession) -> Iterator[Any]:
    """All CPUs but one, held as another job would."""
    import ray

    group = ray.util.placement_group([{"CPU": 2}])
    assert group.wait(60)
    yield lambda: ray.util.remove_placement_group(group)
    ray.util.remove_placement_group(group)


def test_worker_slots_that_others_hold_are_waited_for(
    session: RaySession, others: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Release(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            others()

    release = Release()
    logging.getLogger("moe_dist.training").addHandler(release)

    def job(payload: dict[str, Any]) -> int:
        import os

        return int(os.environ["WORLD_SIZE"])

    try:
        result = run_on_workers(
            job, {}, num_workers=2, storage_path=tmp_path, name="job", session=session
        )
    finally:
        logging.getLogger("moe_dist.training").removeHandler(release)
    assert result.value == 2 and result.world_sizes == (2,)
    assert any("2 workers of 1 CPU each, and 1 fit now" in line for line in caplog.messages)


def test_a_wait_that_lasts_too_long_is_an_error(
    session: RaySession, others: Any, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"waited .*parallel.wait_s=3.*2 workers") as caught:
        run_on_workers(
            *(print, {}),
            num_workers=2,
            storage_path=tmp_path,
            name="job",
            session=session,
            wait_s=3,
        )
    assert "continues from the newest checkpoint" in caught.value.remedy
    assert time.monotonic() - started < 120
