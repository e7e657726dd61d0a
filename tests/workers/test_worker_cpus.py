"""What `parallel.cpus_per_worker: auto` is, on a machine of six CPUs."""

from __future__ import annotations

from typing import Any

import pytest

from moe_dist.config.sections import ParallelConfig
from moe_dist.workers.worker_cpus import trial_cpus, worker_cpus


@pytest.fixture(autouse=True)
def six_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six CPUs, no GPU, no cluster, and nothing asked for."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("moe_dist.workers.worker_cpus.available_cpus", lambda: 6)
    set_gpus(monkeypatch, 0)


def set_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def cpus(**parallel: Any) -> int:
    return worker_cpus(ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("parallel", "count"),
    [
        ({}, 6),
        ({"launcher": "local"}, 6),
        ({"launcher": "ray"}, 6),
        ({"num_workers": 2}, 3),
        ({"num_workers": 4}, 1),
        ({"num_workers": 8}, 1),
        ({"num_workers": [2, 3]}, 2),
        ({"num_workers": [1, 2]}, 3),
    ],
)
def test_this_machine_is_shared_by_the_most_workers(parallel: dict[str, Any], count: int) -> None:
    assert cpus(**parallel) == count


def test_a_cluster_lends_one_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert cpus() == cpus(num_workers=2) == cpus(num_workers=[2, 4]) == 1
    assert cpus(num_workers=2, cpus_per_worker=3) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cpus(launcher="local") == 6


def test_beside_a_gpu_one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpus(use_gpu=True) == cpus(use_gpu=True, num_workers=2) == 1
    set_gpus(monkeypatch, 1)
    assert cpus() == cpus(launcher="ray") == 1
    assert cpus(use_gpu=False) == 6
    # One GPU is not enough for both, so that they compute on CPUs.
    assert cpus(num_workers=2) == 3
    set_gpus(monkeypatch, 2)
    assert cpus(num_workers=2) == cpus(num_workers=[2, 3]) == 1
    assert cpus(cpus_per_worker=4) == 4


@pytest.mark.parametrize(
    ("set_to", "alone", "of_two"),
    [("1", 1, 1), ("2", 2, 2), ("8", 8, 3), ("0", 6, 3), ("", 6, 3), ("4,2", 6, 3)],
)
def test_the_environment_counts_instead_of_auto_and_not_of_a_number(
    monkeypatch: pytest.MonkeyPatch, set_to: str, alone: int, of_two: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    assert cpus() == alone
    assert cpus(num_workers=2) == of_two
    assert cpus(cpus_per_worker=5) == cpus(cpus_per_worker=5, num_workers=2) == 5


def test_trials_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert (trial_cpus("auto"), trial_cpus(1), trial_cpus(3)) == (1, 1, 3)
