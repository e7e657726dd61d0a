"""The ep_size that a job settles on with the ranks it finds, and what it says about it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from moe_dist.distributed.launch import spawn_gloo
from moe_dist.jobs.expert_groups import settle_ep_size
from tests.distributed.tiny_moe import TinyMoE


def settle(rank: int, world_size: int, out: Path) -> None:
    """Settle several wishes, with one rank less on the first of two nodes than on the second."""
    os.environ["NODE_RANK"] = "0" if rank == 0 else "1"
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moe_dist").addHandler(handler)
    sizes = [settle_ep_size(TinyMoE(), wished) for wished in (1, 2, 3, 4)]
    (out / f"{rank}.json").write_text(json.dumps({"sizes": sizes, "lines": lines}))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for world_size in (2, 3):
        out = tmp_path_factory.mktemp(f"world{world_size}")
        spawn_gloo(settle, world_size, out)
        found[world_size] = [
            json.loads((out / f"{rank}.json").read_text()) for rank in range(world_size)
        ]
    return found


@pytest.mark.distributed
def test_ep_size_falls_where_it_does_not_fit(told: dict[int, list[dict[str, Any]]]) -> None:
    assert [rank["sizes"] for rank in told[2]] == [[1, 2, 2, 2]] * 2
    assert [rank["sizes"] for rank in told[3]] == [[1, 1, 1, 1]] * 3


@pytest.mark.distributed
def test_rank_zero_says_so(told: dict[int, list[dict[str, Any]]]) -> None:
    assert told[3][0]["lines"] == [
        f"3 workers and 4 experts: parallel.ep_size={wished} falls to 1" for wished in (2, 3, 4)
    ]
    crossing = [line for line in told[2][0]["lines"] if "cross nodes" in line]
    assert len(crossing) == 3 and "1 + 1 workers on the nodes" in crossing[0]
    assert told[2][1]["lines"] == told[3][1]["lines"] == []


def test_a_dense_model_has_nothing_to_spread() -> None:
    assert settle_ep_size(nn.Linear(2, 2), 4) == 1


def test_one_process_keeps_all_experts(caplog: pytest.LogCaptureFixture) -> None:
    assert settle_ep_size(TinyMoE(), 4) == 1
    assert caplog.messages == ["1 workers and 4 experts: parallel.ep_size=4 falls to 1"]
