"""What MLflow gets of the metrics of experts, and the line in front of a database."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from moe_dist.tracking.database_lock import DatabaseLock
from moe_dist.tracking.metric_summary import summarise_metrics


def test_figures_of_single_experts_become_a_summary() -> None:
    shown = summarise_metrics(
        {
            "train/loss/total": 1.0,
            "moe/load_imbalance/layer.0": 1.5,
            "moe/load_imbalance/layer.1": 2.5,
            "moe/expert_load/layer.0/0": 0.75,
            "moe/expert_load/layer.0/1": 0.25,
            "moe/expert_load/layer.1/0": 0.5,
            "moe/expert_load/layer.1/1": 0.5,
        }
    )
    assert shown == {
        "train/loss/total": 1.0,
        "moe/load_imbalance_worst": 2.5,
        "moe/load_imbalance_mean": 2.0,
        "moe/dev_load_imbalance_worst": 1.5,
        "moe/dev_load_imbalance_mean": 1.25,
    }


def test_one_writer_at_a_time_has_its_turn(tmp_path: Path) -> None:
    inside: list[int] = []
    most = 0

    def write() -> None:
        nonlocal most
        with DatabaseLock(tmp_path / "mlflow.db").held():
            inside.append(1)
            most = max(most, len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_writer_that_stands_still_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_dist.tracking.database_lock.MAX_WAIT_S", 0.1)
    with DatabaseLock(tmp_path / "mlflow.db").held(), DatabaseLock(tmp_path / "mlflow.db").held():
        pass


def test_servers_need_no_lock() -> None:
    with DatabaseLock(None).held(), DatabaseLock(None).held():
        pass
