"""The metric log keeps every whole record, whoever dies while writing it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moe_dist.metric_log import MetricLog, MetricTail, series


@pytest.fixture
def log(tmp_path: Path) -> MetricLog:
    return MetricLog(tmp_path / "stage" / "metrics.jsonl")


def test_read_returns_what_was_appended(log: MetricLog) -> None:
    log.append(1, {"train/loss": 0.5})
    log.append(1, {"dev/accuracy": 0.75})
    log.append(2, {"train/loss": 0.25, "train/lr": 1e-5})
    records = log.read()
    assert [record.step for record in records] == [1, 1, 2]
    assert records[2].metrics == {"train/loss": 0.25, "train/lr": 1e-5}
    assert records[0].time <= records[2].time


def test_missing_log_reads_as_empty(log: MetricLog) -> None:
    assert log.read() == []
    log.truncate_after(3)
    assert not log.path.exists()


def test_non_finite_values_stay_valid_json(log: MetricLog) -> None:
    log.append(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    metrics = log.read()[0].metrics
    assert math.isnan(metrics["a"]) and math.isnan(metrics["b"]) and metrics["c"] == 1.0
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail)["metrics"]["a"] is None


def test_torn_line_costs_only_itself(log: MetricLog) -> None:
    log.append(1, {"a": 1.0})
    with log.path.open("a") as stream:
        stream.write('{"step": 2, "time": 1.0, "met')
    log.append(3, {"a": 3.0})
    assert [record.step for record in log.read()] == [1, 3]


def test_truncate_drops_later_steps(log: MetricLog) -> None:
    for step in range(1, 6):
        log.append(step, {"a": float(step) if step != 2 else math.nan})
    log.truncate_after(3)
    log.append(4, {"a": 40.0})
    assert series(log.read()[2:], "a") == ([3, 4], [3.0, 40.0])
    assert [record.step for record in log.read()] == [1, 2, 3, 4]
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


def test_tail_delivers_each_record_once(log: MetricLog) -> None:
    tail = MetricTail(log.path)
    assert tail.poll() == []
    log.append(1, {"a": 1.0})
    assert [record.step for record in tail.poll()] == [1]
    assert tail.poll() == []
    log.append(2, {"a": 2.0})
    with log.path.open("a") as stream:
        stream.write('{"step": 3, "time": 1.0, ')
    assert [record.step for record in tail.poll()] == [2]
    with log.path.open("a") as stream:
        stream.write('"metrics": {"a": 3.0}}\n')
    assert [record.metrics["a"] for record in tail.poll()] == [3.0]


def test_tail_starts_again_after_a_truncation(log: MetricLog) -> None:
    tail = MetricTail(log.path)
    for step in (1, 2, 3):
        log.append(step, {"a": 1.0})
    assert len(tail.poll()) == 3
    log.truncate_after(2)
    log.append(3, {"a": 5.0})
    assert [record.step for record in tail.poll()] == [1, 2, 3]


def test_series_takes_the_later_value_of_a_step(log: MetricLog) -> None:
    log.append(1, {"a": 1.0})
    log.append(1, {"a": 2.0, "b": 0.0})
    assert series(log.read(), "a") == ([1], [2.0])
    assert series(log.read(), "missing") == ([], [])
