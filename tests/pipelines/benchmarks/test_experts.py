"""The layer beside that of transformers: the same results, every line, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_dist.errors import ConfigError
from pipelines.benchmarks import experts
from pipelines.benchmarks.experts import (
    BACKENDS,
    OURS,
    Case,
    ExpertsBenchmark,
    ExpertsReport,
    ExpertsTiming,
    run,
    to_markdown,
    verdicts,
)
from pipelines.cli import app

TINY = ExpertsBenchmark(
    num_tokens=24, d_model=16, expert_size=8, num_experts=(4,), num_rounds=2, num_threads=1
)


def test_every_way_gives_the_same_and_has_a_line() -> None:
    before = torch.get_num_threads()
    report = run(TINY)
    assert torch.get_num_threads() == before and report.num_threads == 1
    assert [(one.case.precision, one.case.passes, one.layer) for one in report.timings] == [
        (precision, passes, layer)
        for precision in ("fp32", "bf16")
        for passes in ("forward", "forward and backward")
        for layer in (OURS, *BACKENDS)
    ]
    assert not report.left_out
    for one in report.timings:
        assert 0 < one.fastest_ms <= one.median_ms
        assert (one.speed == 1 and one.error == 0) if one.layer == OURS else one.speed > 0
        assert one.error < (1e-5 if one.case.precision == "fp32" else 0.02)


def test_what_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    wrong = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping,
        "grouped_mm",
        lambda self, hidden, ids, weights: wrong(self, hidden, ids, weights * 1.01),
    )
    report = run(replace(TINY, precisions=("fp32",)))
    assert {one.layer for one in report.timings} == {OURS, "eager", "batched_mm"}
    assert len(report.left_out) == 2
    assert "grouped_mm of 4 experts, fp32, forward: its results lie 0.01" in report.left_out[0]


def test_copies_of_weights_that_memory_does_not_hold_are_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 48 * 3 * 8 * 16 * 4
    monkeypatch.setattr(experts, "free_memory", lambda device: 2 * size)
    report = run(replace(TINY, precisions=("fp32",)))
    (left_out,) = report.left_out
    assert left_out.startswith("batched_mm of 4 experts, fp32, forward and backward: its copies")


def test_the_best_of_each_case_is_what_counts(tmp_path: Path) -> None:
    few, many = Case(8, "fp32", "forward"), Case(32, "bf16", "forward")
    timings = (
        ExpertsTiming(few, OURS, 10.0, 9.0, 1.0, 0.0),
        ExpertsTiming(few, "eager", 20.0, 9.0, 2.0, 1e-7),
        ExpertsTiming(few, "grouped_mm", 11.0, 10.0, 1.1, 1e-7),
        ExpertsTiming(many, OURS, 10.0, 9.0, 1.0, 0.0),
        ExpertsTiming(many, "eager", 11.5, 11.0, 1.15, 3e-3),
    )
    report = ExpertsReport(timings, ("batched_mm of it: too large",), 2, "torch 1", "busy")
    said = verdicts(report)
    assert said == [
        "8 experts, fp32, forward: 1.10 x as fast as grouped_mm, the best of transformers; the "
        "goal of 1 x is reached",
        "32 experts, bf16, forward: 1.15 x as fast as eager, the best of transformers; the goal "
        "of 1.2 x is missed",
        "left out: batched_mm of it: too large",
        "busy",
    ]
    page = to_markdown(report, TINY)
    assert "| 32 | bf16 | forward | eager | 11.5 | 11.0 | 1.15 x | 3e-03 |" in page
    assert all(f"- {line}" in page for line in said)


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    options = "--experts 4 --tokens 8 --d-model 16 --expert-size 8 --rounds 1 --precision fp32"
    result = CliRunner().invoke(
        app,
        ["benchmark", "experts", *options.split(), "--output", str(tmp_path)],
        env={"COLUMNS": "250"},
    )
    assert result.exit_code == 0, result.output
    assert "the best of transformers" in result.output
    written = json.loads((tmp_path / "experts.json").read_text())
    assert len(written["timings"]) == 8 and written["timings"][0]["case"]["num_experts"] == 4
    assert "| 4 | fp32 | forward | moe-dist |" in (tmp_path / "experts.md").read_text()


def test_faults_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        run(ExpertsBenchmark(num_rounds=0, num_experts=(1,), precisions=("fp8",), top_k=1))
    assert len(caught.value.faults) == 4
    assert "--rounds is 0" in str(caught.value)
