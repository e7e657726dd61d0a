"""The merge benchmark counts and times what it says it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_dist.errors import ConfigError
from moe_dist.moe import use_context
from pipelines.benchmarks.live_memory import LiveMemory
from pipelines.benchmarks.merge import (
    MERGED,
    NAIVE,
    PLAIN,
    MergeBenchmark,
    _experts,
    _layer,
    _Naive,
    _texts,
    count_flops,
    run,
    to_markdown,
    verdicts,
)
from pipelines.cli import app

TINY = MergeBenchmark(
    d_model=64,
    expert_size=32,
    num_layers=3,
    vocab_size=50,
    flop_top_ks=(1, 2, 4),
    flop_tokens=16,
    num_experts=8,
    time_top_ks=(1, 8),
    batch_size=2,
    seq_lens=(128, 3),
    num_repeats=2,
    num_threads=1,
)


def test_flops_are_those_of_the_whole_model() -> None:
    found = {one.top_k: one for one in count_flops(TINY)}
    # Of one layer: two products of 16 tokens with 64 x 32 weights, a multiply-add counts as 2.
    ffn = 2 * 16 * 2 * 64 * 32
    attention = 2 * 16 * 4 * 64 * 64 + 2 * 2 * 16 * 16 * 64
    head = 2 * 16 * (64 * 64 + 64 * 50)
    gate = 2 * 16 * 64 * 4
    assert found[2].plain * 1e9 == pytest.approx(3 * (attention + 2 * ffn + gate) + head)
    # A merge costs as much as K tokens, biases apart; its two gates read one mean.
    gates = 2 * 2 * 64 * 4 + 2 * 4 * (32 + 64)
    assert found[4].merged * 1e9 == pytest.approx(
        3 * (attention + ffn * (1 + 4 / 16) + gates) + head
    )


def test_every_way_computes_and_is_timed() -> None:
    report = run(replace(TINY, backward=True))
    assert [(one.seq_len, one.top_k, one.way) for one in report.timings] == [
        (length, top_k, way)
        for length in (128, 3)
        for top_k in (1, 8)
        for way in (PLAIN, NAIVE, *MERGED)
    ]
    assert all(one.median_ms > 0 and one.peak_mib > 0 for one in report.timings)
    assert all(one.ratio == 1 for one in report.timings if one.way == PLAIN)
    applied = {
        (one.seq_len, one.top_k): one.applies for one in report.timings if one.way == MERGED[0]
    }
    assert not applied[128, 8] and applied[3, 8]
    assert (
        len(verdicts(report)) == 2
        and verdicts(replace(report, settings=replace(TINY, seq_lens=(3,)))) == []
    )
    text = to_markdown(report)
    assert "| K | plain |" in text.replace("  ", " ") and "merged_sequence (applied)" in text


@torch.no_grad()
def test_the_naive_merge_gives_what_the_layer_gives() -> None:
    hidden, context = _texts(TINY, 2, 16, torch.device("cpu"))
    layer = _layer(_experts(TINY, 8), MERGED[0], 4)
    with use_context(context):
        torch.testing.assert_close(_Naive(layer)(hidden), layer(hidden), rtol=1e-4, atol=1e-5)
        # Its weights of every sequence are what it pays for.
        peak = LiveMemory.peak_of(lambda: _Naive(layer)(hidden))
    assert peak > 4 * 2 * 64 * 32


def test_live_memory_is_that_of_tensors_that_are_there_at_one_time() -> None:
    given = torch.randn(50, 50)

    def call() -> torch.Tensor:
        first = given @ given
        second = first + 1
        del first
        third = second * 2
        return third.view(-1)

    assert LiveMemory.peak_of(call) == 2 * 50 * 50 * 4


def test_files_are_written(tmp_path: Path) -> None:
    sizes = ["--d-model", "16", "--expert-size", "8", "--batch-size", "2", "--seq-len", "4"]
    more = ["--flop-top-k", "2", "--top-k", "2", "--experts", "2", "--repeats", "1"]
    command = ["benchmark", "merge", *sizes, *more, "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    written = json.loads((tmp_path / "out/merge.json").read_text())
    assert written["flops"][0]["top_k"] == 2 and len(written["timings"]) == 4
    assert (tmp_path / "out/merge.md").read_text().startswith("GFLOPs, 12 layers")


def test_faults_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        run(replace(TINY, num_experts=1, batch_size=0, seq_lens=(), flop_top_ks=(1,)))
    assert len(caught.value.faults) == 5
