"""The student benchmark times both models and says what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_dist.errors import ConfigError
from pipelines.benchmarks.students import StudentBenchmark, main, run

TINY = StudentBenchmark(
    num_layers=1,
    hidden_size=16,
    intermediate_size=16,
    batch_sizes=(1, 2),
    seq_len=8,
    num_repeats=1,
    num_threads=1,
    teacher=(
        ("num_hidden_layers", 3),
        ("hidden_size", 32),
        ("num_attention_heads", 2),
        ("intermediate_size", 64),
        ("vocab_size", 50),
    ),
)


def test_both_models_are_counted_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(TINY)
    assert report.num_parameters[0] > report.num_parameters[1]
    assert report.flops_per_sentence[0] > 3 * report.flops_per_sentence[1]
    assert [timing.batch_size for timing in report.timings] == [1, 2]
    for timing in report.timings:
        assert timing.speedup == pytest.approx(timing.teacher_ms / timing.student_ms)
    main(TINY)
    shown = capsys.readouterr().out
    assert "speed-up" in shown and "published" not in shown


def test_sizes_that_leave_nothing_to_time_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_repeats is 0"):
        run(replace(TINY, num_repeats=0, batch_sizes=(0,)))
