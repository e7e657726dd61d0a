"""What follows from what nodes and workers told, without a cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.exchange import Exchange
from cluster.findings import (
    judge_clocks,
    judge_exchange,
    judge_storage,
    judge_topology,
    judge_versions,
)
from cluster.node_probe import NodeProbe, source_digest

SAME = {"python": "3.11.7", "torch": "2.13.0", "moe_dist source": "abc"}


def test_equal_versions() -> None:
    (finding,) = judge_versions({"a": SAME, "b": dict(SAME)})
    assert finding.state == "ok" and "2 node(s): python 3.11.7, torch 2.13.0" in finding.found


def test_each_version_that_differs_is_a_fault() -> None:
    other = SAME | {"torch": "2.12.0", "moe_dist source": "missing"}
    torch, source = judge_versions({"a": SAME, "b": other, "c": SAME})
    assert (torch.state, torch.found) == ("fault", "torch: 2.13.0 on a, c; 2.12.0 on b")
    assert source.found == "moe_dist source: abc on a, c; missing on b"
    assert "constraints.txt" in torch.remedy


def test_a_package_that_is_missing_everywhere_is_a_fault() -> None:
    (finding,) = judge_versions({"a": SAME | {"torch": "missing"}})
    assert finding.state == "fault" and finding.found == "torch: missing on a"


def test_storage() -> None:
    (fine,) = judge_storage("/shared", {}, {"a": [], "b": []})
    assert fine.state == "ok"
    unwritable, unseen = judge_storage(
        "/shared", {"a": "Permission denied"}, {"a": [], "b": ["a", "c"], "c": ["b"]}
    )
    assert unwritable.state == unseen.state == "fault"
    assert "cannot be written (a: Permission denied)" in unwritable.found
    assert "b does not see a, c; c does not see b" in unseen.found


@pytest.mark.parametrize(
    ("offsets", "state"),
    [
        ({"a": (0.0, 0.01), "b": (0.5, 0.01)}, "ok"),
        ({"a": (0.0, 0.01), "b": (1.5, 0.01)}, "warning"),
        ({"a": (-0.8, 0.01), "b": (0.8, 0.01)}, "warning"),
        # A slow answer proves nothing.
        ({"a": (0.0, 0.01), "b": (3.0, 2.5)}, "ok"),
    ],
)
def test_clocks(offsets: dict[str, tuple[float, float]], state: str) -> None:
    assert judge_clocks(offsets).state == state


def exchange(
    *nodes: str, gb_per_s: float = 1.0, is_correct: bool = True, device_gib: float = 0.0
) -> Exchange:
    return Exchange(nodes, "gloo", 0.2, gb_per_s, is_correct, device_gib)


def states(measured: Exchange, *, ep_size: int = 2, memory_gib: float | None = 4) -> list[str]:
    findings = judge_exchange(
        measured, wished_ep_size=ep_size, num_experts=4, memory_gib=memory_gib
    )
    return [f"{finding.check} {finding.state}" for finding in findings]


def test_exchange() -> None:
    assert states(exchange("a", "a")) == ["all-to-all ok", "topology ok"]
    assert states(exchange("a", "b")) == ["all-to-all ok", "topology warning"]
    assert states(exchange("a", "a", gb_per_s=0.01))[0] == "all-to-all warning"
    assert states(exchange("a", "a", is_correct=False))[0] == "all-to-all fault"
    assert states(exchange("a", "a", device_gib=3))[2] == "GPU memory fault"
    assert states(exchange("a", "a", device_gib=5))[2] == "GPU memory ok"
    assert len(states(exchange("a", "a", device_gib=5), memory_gib=None)) == 2


def test_topology() -> None:
    fine = judge_topology(["a", "a", "b", "b"], 2, 4)
    assert fine.state == "ok" and "2 + 2 workers" in fine.found
    crossing = judge_topology(["a", "a", "a", "b"], 2, 4)
    assert crossing.state == "warning" and "ranks 2-3; 3 + 1 workers" in crossing.found
    assert crossing.remedy.startswith("A multiple of parallel.ep_size=2 workers on each node")
    fallen = judge_topology(["a", "a", "b"], 2, 4)
    assert fallen.state == "warning" and "falls to 1" in fallen.found


def test_a_probe_writes_and_reads_tokens(tmp_path: Path) -> None:
    probe = NodeProbe()
    assert probe.write_token(str(tmp_path), "a", "1") == ""
    assert probe.write_token(str(tmp_path / "missing"), "a", "1") == "No such file or directory"
    assert probe.read_tokens(str(tmp_path), {"a": "1"}) == []
    assert probe.read_tokens(str(tmp_path), {"a": "2", "b": "1"}) == ["a", "b"]


def test_a_probe_names_versions() -> None:
    found = NodeProbe().versions()
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert found["torch"].startswith("2.") and found["moe_dist source"] == source_digest()
    assert len(source_digest()) == 12
