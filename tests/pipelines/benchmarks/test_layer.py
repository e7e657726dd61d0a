"""The layer benchmark measures every layer and reports what it measured."""

from __future__ import annotations

import pytest
import torch

from moe_dist.errors import ConfigError
from pipelines.benchmarks.layer import LayerBenchmark, main, run

TINY = LayerBenchmark(
    num_tokens=16, d_model=8, num_experts=2, expert_size=8, num_repeats=3, num_threads=1
)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_layer_has_a_line(backward: bool, top_k: int) -> None:
    settings = LayerBenchmark(**{**vars(TINY), "backward": backward, "top_k": top_k})
    before = torch.get_num_threads()
    timings = run(settings)
    assert torch.get_num_threads() == before
    assert [(timing.precision, timing.layer) for timing in timings] == [
        (precision, layer)
        for precision in ("fp32", "bf16")
        for layer in ("dense", "hash_random", "token_gate")
    ]
    assert all(0 < timing.fastest_ms <= timing.median_ms for timing in timings)
    assert all(timing.ratio == 1 for timing in timings if timing.layer == "dense")
    assert all(timing.ratio > 0 for timing in timings)


def test_the_table_and_the_verdict_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(TINY)
    printed = capsys.readouterr().out
    for word in ("hash_random", "token_gate", "dense", "bf16", "goal of 1.15"):
        assert word in printed


def test_faults_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        run(LayerBenchmark(num_tokens=0, num_experts=1, precisions=("fp8",), num_threads=-1))
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "fp8" in text
    assert "num_tokens" in text
    assert "num_experts" in text
