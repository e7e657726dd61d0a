"""The throughput benchmark trains in pairs and alone, and relates the two."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_dist.errors import ConfigError
from pipelines.benchmarks.importance import ImportanceBenchmark
from pipelines.benchmarks.throughput import ALONE, TOGETHER, ThroughputBenchmark, run

TINY = ThroughputBenchmark(
    batch_size=4,
    num_steps=2,
    num_repeats=2,
    sentences=ImportanceBenchmark(
        num_samples=24, d_model=32, num_layers=2, num_neurons=64, vocab_size=50
    ),
    expert_size=16,
    num_shared_neurons=8,
)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_ways_are_measured() -> None:
    together, alone = run(TINY)
    assert (together.way, alone.way) == (TOGETHER, ALONE)
    assert alone.ratio == 1
    assert together.ratio > 0
    assert min(together.tokens_per_s, alone.tokens_per_s, together.step_ms, alone.step_ms) > 0


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_skewed_experts_are_placed_by_load(capfd: pytest.CaptureFixture[str]) -> None:
    run(replace(TINY, skewed=True))
    assert "placed by load: the busiest of 2 ranks" in capfd.readouterr().err
    run(replace(TINY, skewed=True, in_order=True))
    assert "by load" not in capfd.readouterr().err


def test_faults_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        run(ThroughputBenchmark(batch_size=0, ep_size=3))
    assert len(caught.value.faults) == 2
