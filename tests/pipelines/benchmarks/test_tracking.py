"""Processes that log to one sqlite store at once lose nothing."""

from __future__ import annotations

import pytest

from moe_dist.errors import MoeDistError
from pipelines.benchmarks.tracking import TrackingBenchmark, run, to_table

pytest.importorskip("mlflow")


def test_concurrent_processes_lose_and_double_nothing() -> None:
    result = run(TrackingBenchmark(num_runs=6, num_processes=3, num_steps=5))
    assert result.complaints == ()
    assert (result.num_runs, result.num_points, result.num_lost) == (6, 60, 0)
    assert result.num_reported == 6 and 0 < result.report_mb < 5
    assert to_table(result).row_count == 7


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(MoeDistError, match="num_runs is 0"):
        run(TrackingBenchmark(num_runs=0))
