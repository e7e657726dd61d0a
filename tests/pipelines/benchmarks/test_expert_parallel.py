"""The expert-parallel benchmark compares what it times, and counts what was sent."""

from __future__ import annotations

import pytest
import torch

from moe_dist.errors import ConfigError
from pipelines.benchmarks.expert_parallel import TOLERANCE, ExpertParallelBenchmark, main, run

TINY = ExpertParallelBenchmark(
    num_tokens=64, d_model=16, expert_size=8, num_experts=4, loads=(1, 4), num_repeats=2
)


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_ours_equals_deepspeed_and_sends_what_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    main(TINY)
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("DeepSpeed", "floor", "balanced", "goal 1.15"):
        assert word in printed
    # Of 64 tokens on each rank, half leave at a balanced load: 2 ranks x 32 x 16 x 4 bytes, 4 ways.
    assert "16,384 of 16,384 leaving bytes sent: reached" in printed
    assert f"(goal {TOLERANCE:.0e}): reached" in printed
    assert f"(goal {TOLERANCE:.0e}): missed" not in printed


def test_the_load_decides_how_many_tokens_an_expert_draws() -> None:
    from pipelines.benchmarks.expert_parallel_rank import Sizes, draw_experts

    sizes = Sizes(num_tokens=1100, d_model=8, expert_size=8, num_experts=4)
    counts = torch.bincount(draw_experts(sizes, 8, rank=0)).tolist()
    assert counts == [800, 100, 100, 100]


def test_faults_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        run(ExpertParallelBenchmark(num_tokens=0, num_experts=3, loads=()))
    assert len(caught.value.faults) == 3
