"""The importance benchmark compares equal scores and reports what it measured."""

from __future__ import annotations

import pytest
import torch

from moe_dist.errors import ConfigError
from pipelines.benchmarks.importance import TOLERANCE, ImportanceBenchmark, main, run

TINY = ImportanceBenchmark(
    num_samples=5,
    batch_size=2,
    min_tokens=2,
    max_tokens=7,
    num_repeats=1,
    num_threads=1,
    device="cpu",
    d_model=16,
    num_layers=2,
    num_neurons=24,
    vocab_size=50,
)


def test_all_ways_give_the_same_scores() -> None:
    before = torch.get_num_threads()
    timings = run(TINY)
    assert torch.get_num_threads() == before
    assert [timing.name for timing in timings] == [
        "one backward a batch",
        "loop",
        "loop, FFN gradients only",
    ]
    assert timings[0].ratio == 1
    assert all(timing.median_s > 0 for timing in timings)
    assert 0 < timings[1].largest_difference <= TOLERANCE
    assert 0 < timings[2].largest_difference <= TOLERANCE


def test_main_says_whether_the_goal_is_reached(capsys: pytest.CaptureFixture[str]) -> None:
    main(TINY)
    shown = capsys.readouterr().out
    assert "loop, FFN gradients only" in shown
    assert "scores are the same to 1e-05" in " ".join(shown.split())


def test_sizes_that_make_no_sense() -> None:
    with pytest.raises(ConfigError) as caught:
        run(ImportanceBenchmark(num_samples=0, min_tokens=9, max_tokens=8))
    assert len(caught.value.faults) == 2
