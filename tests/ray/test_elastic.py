"""A job of two to three workers loses a node, goes on with two, and gets the third one back."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.workers import placement
from moe_dist.workers.attempts import ATTEMPTS_NAME
from moe_dist.workers.driver import JobResult, run_on_workers
from moe_dist.workers.ray_session import ray_session
from tests.ray.clusters import SmallCluster, small_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, "waited five minutes"
        time.sleep(0.5)


def lose_and_regain(cluster: SmallCluster, directory: Path) -> None:
    """Take a node away once all three workers run, and give one back once two of them do."""

    def last_size() -> int:
        path = directory / "job" / ATTEMPTS_NAME
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["world_size"]) if lines else 0

    def steps() -> int:
        path = directory / "steps"
        return len(path.read_text().splitlines()) if path.exists() else 0

    wait_until(lambda: last_size() == 3 and steps() > 5)
    cluster.remove(cluster.nodes[-1])
    wait_until(lambda: last_size() == 2)
    cluster.add(1)
    wait_until(lambda: last_size() == 3)
    (directory / "enough").touch()


def test_workers_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(placement, "RESIZE_INTERVAL_S", 3.0)
    caplog.set_level(logging.WARNING)

    def job(payload: dict[str, Any]) -> dict[str, Any]:
        import time
        from pathlib import Path

        import torch.distributed as dist
        from torch import nn

        from moe_dist.jobs.expert_groups import settle_ep_size
        from moe_dist.moe import Experts, MoELayer, build_router
        from moe_dist.training.collectives import gather_values

        directory = Path(payload["directory"])
        router = build_router("token_gate", d_model=4, num_experts=4)
        model = nn.Sequential(MoELayer(Experts(4, 4, 2, activation="relu"), router))
        ep_size = settle_ep_size(model, wished=2)
        steps = directory / "steps"
        first = len(steps.read_text().splitlines()) if steps.exists() else 0
        first = max(gather_values(first))
        for step in range(first, 10_000):
            dist.barrier()
            time.sleep(0.2)
            if dist.get_rank() == 0:
                with steps.open("a") as stream:
                    stream.write(f"{step} {dist.get_world_size()} {ep_size}\n")
            # All ranks stop at the same step, whenever they see the file.
            if any(gather_values((directory / "enough").exists())):
                break
        return {"ep_size": ep_size, "last": step}

    results: list[JobResult] = []
    with small_cluster(1, 1, 1, temp_dir="/tmp/place-ela") as cluster, ray_session() as session:
        session.connect()

        def run() -> None:
            results.append(
                run_on_workers(
                    job,
                    {"directory": str(tmp_path)},
                    num_workers=(2, 3),
                    max_failures=3,
                    storage_path=tmp_path,
                    name="job",
                    session=session,
                )
            )

        # Nodes are started from the main thread, which may set the signal handlers.
        training = threading.Thread(target=run)
        training.start()
        lose_and_regain(cluster, tmp_path)
        training.join(300)
    (result,) = results
    lines = [line.split() for line in (tmp_path / "steps").read_text().splitlines()]
    assert [int(step) for step, _, _ in lines] == list(range(len(lines)))
    sizes = list(dict.fromkeys((size, ep_size) for _, size, ep_size in lines))
    assert sizes == [("3", "1"), ("2", "2")]
    assert result.world_sizes[0] == result.world_sizes[-1] == 3 and 2 in result.world_sizes
    assert result.value == {"ep_size": 1, "last": len(lines) - 1}
    assert "3 workers and 4 experts: parallel.ep_size=2 falls to 1" in caplog.messages
