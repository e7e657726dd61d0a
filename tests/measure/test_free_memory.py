"""Free memory: the host's, or less where a container is limited, or the GPU's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_dist.measure import free_memory
from moe_dist.measure.free_memory import free_memory as find_free

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("most", "expected"), [("5000", 5000 - 3000 + 700), ("max", 10**6), ("2000", 0), ("", 10**6)]
)
def test_a_container_may_leave_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str, expected: int
) -> None:
    host = SimpleNamespace(available=10**6)
    monkeypatch.setattr(free_memory.psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    assert find_free(CPU) == 10**6
    (tmp_path / "memory.current").write_text("3000\n")
    cached = 0 if most == "2000" else 700
    (tmp_path / "memory.stat").write_text(f"anon 90\ninactive_file {cached}\nactive_file 40\n")
    if most:
        (tmp_path / "memory.max").write_text(f"{most}\n")
    assert find_free(CPU) == expected
    host.available = 100
    assert find_free(CPU) == min(100, expected)


@pytest.mark.parametrize(("most", "expected"), [(5000, 2700), (2**63 - 4096, 10**6)])
def test_so_may_an_older_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    host = SimpleNamespace(available=10**6)
    monkeypatch.setattr(free_memory.psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    group = tmp_path / "memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(f"{most}\n")
    (group / "memory.usage_in_bytes").write_text("3000\n")
    (group / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 700\n")
    assert find_free(CPU) == expected


def test_on_a_gpu_its_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert find_free(torch.device("cuda", 0)) == 123
