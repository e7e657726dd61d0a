"""The checkpoint benchmark measures what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.errors import ConfigError
from pipelines.benchmarks.checkpoint import CheckpointBenchmark, CheckpointCost, main, run


def test_a_tiny_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        CheckpointBenchmark(
            num_workers=(1,),
            num_checkpoints=3,
            num_steps=2,
            batch_size=4,
            num_tokens=5,
            directory=tmp_path,
            d_model=16,
            num_layers=2,
            num_neurons=24,
            vocab_size=50,
        )
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "worst share" in shown and "stall s" in shown
    assert not list(tmp_path.iterdir()), "the checkpoints are removed again"


def test_the_share_counts_stall_and_slowing() -> None:
    cost = CheckpointCost(
        num_workers=1,
        num_parameters=10,
        step_s=0.5,
        stall_s=2.0,
        slowed_s=3.0,
        write_s=4.0,
        megabytes=1.0,
    )
    assert cost.share(100) == pytest.approx(0.1)
    assert CheckpointCost(**{**vars(cost), "slowed_s": -1.0}).share(100) == pytest.approx(0.04)


def test_sizes_that_make_no_sense() -> None:
    with pytest.raises(ConfigError) as caught:
        run(CheckpointBenchmark(num_workers=(3,), batch_size=2, num_steps=0))
    assert len(caught.value.faults) == 2
