"""The importance benchmark compares equal scores and reports what it measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_dist.errors import ConfigError
from pipelines.benchmarks.importance import TOLERANCE, ImportanceBenchmark, main, run

TINY = ImportanceBenchmark(
    num_samples=9,
    num_looped=4,
    batch_size=2,
    mean_tokens=4.0,
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
    result = run(TINY)
    assert torch.get_num_threads() == before
    scorer, loop, ffn_only = result.timings
    assert [one.name for one in result.timings] == [
        "one backward a batch",
        "loop",
        "loop, FFN gradients only",
    ]
    assert scorer.ratio == 1
    assert all(one.sentence_ms > 0 for one in result.timings)
    assert 0 < loop.largest_difference <= TOLERANCE
    assert 0 < ffn_only.largest_difference <= TOLERANCE
    assert scorer.sentence_gflop < ffn_only.sentence_gflop < loop.sentence_gflop
    assert 0 <= result.padding < 1
    assert result.peak_gflops > 0
    assert result.bound > 0


def test_loops_get_sentences_of_the_same_mean_length() -> None:
    result = run(replace(TINY, num_samples=64, num_looped=16, max_tokens=20, mean_tokens=8.0))
    everything, looped = result.mean_tokens
    assert looped == pytest.approx(everything, rel=0.03)


def test_equal_lengths_need_no_padding() -> None:
    result = run(replace(TINY, spread=0.0))
    assert result.mean_tokens == (4, 4)
    assert result.padding == 0


def test_main_says_whether_the_goal_is_reached(capsys: pytest.CaptureFixture[str]) -> None:
    main(TINY, replace(TINY, mean_tokens=6.0))
    shown = capsys.readouterr().out
    assert "loop, FFN gradients only" in shown
    assert " ".join(shown.split()).count("scores are the same to 1e-05") == 2


def test_sizes_that_make_no_sense() -> None:
    with pytest.raises(ConfigError) as caught:
        run(ImportanceBenchmark(num_samples=0, min_tokens=9, max_tokens=8, spread=-1.0))
    assert len(caught.value.faults) == 3
