"""The search benchmark's figures and words; the sweeps themselves are tested in tests/ray."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from moe_dist.measure.bootstrap import Interval
from pipelines.benchmarks import search as benchmark
from pipelines.benchmarks.search import (
    SearchBenchmark,
    SearchFigures,
    SweepFigures,
    main,
    to_table,
)


def figures(scheduler: str, seconds: float, steps: int) -> SweepFigures:
    result: Any = None
    return SweepFigures(scheduler, 16, seconds, 80.0, 2, steps, 400, result, before_s=12.0)


def test_the_ratio_counts_everything_beside_the_training() -> None:
    assert figures("none", 60.0, 400).ratio == 1.5


def test_the_table_and_the_verdicts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = Interval(difference=-0.01, low=-0.03, high=0.01, p_value=0.4, bootstrap=(-0.03, 0.01))
    found = SearchFigures(figures("none", 90.0, 400), figures("asha", 40.0, 160), worse)
    Console(width=120).print(to_table(found))
    printed = capsys.readouterr().out
    for word in ("none", "asha", "2.25", "160 (40 %)"):
        assert word in printed
    monkeypatch.setattr(benchmark, "run", lambda settings: found)
    main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "asha: 12.0 s before the first trial" in printed
    assert "2.25 × the training time" in printed and "2 × is missed" in printed
    assert "ASHA took 40 % of the steps" in printed and printed.endswith("is reached")
    clearly = Interval(
        difference=-0.03, low=-0.05, high=-0.01, p_value=0.01, bootstrap=(-0.05, -0.01)
    )
    assert not SearchFigures(found.whole, found.asha, clearly).is_as_good
    assert SearchFigures(found.whole, found.asha).is_as_good
    # Of perplexities the lower one is better.
    assert SearchFigures(found.whole, found.asha, clearly, higher_is_better=False).is_as_good


def test_both_sweeps_get_the_same_points() -> None:
    from pathlib import Path

    config = benchmark._config(SearchBenchmark(num_trials=4), Path("/tmp/x"))
    assert config.search.chosen_algorithm == "random"
    assert config.search.num_trials == 3 and config.search.baseline
    assert config.train.max_steps == 24 and config.parallel.max_workers == 1
