"""The whole chain with merged experts: what is said before, logged, measured and reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.metric_log import METRIC_LOG, MetricLog
from pipelines.chain.chain import run_chain
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]
COPIES = {
    "num_experts": 4,
    "expert_size": 32,
    "num_shared_neurons": 0,
    "partition": "full_copy",
    "router": "merged_sequence",
    "top_k": 2,
}


def test_a_merged_student_is_trained_measured_and_reported(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings |= {"moe": COPIES, "distill": {"load_balancing_weight": 0.1}}
    config = load_config(write_recipe(tiny_settings))
    console = Recorder()
    run_chain(config, console)
    directory = Path(config.run_dir)
    report = json.loads((directory / "report.json").read_text())
    gates = report["student"]["gates"]
    # Two layers, each with a gate for both of its linear layers.
    assert len(gates["entropy"]) == 4
    assert {name.rpartition(".")[2] for name in gates["entropy"]} == {"in", "out"}
    assert 0 < gates["mean_entropy"] <= gates["max_entropy"] == pytest.approx(math.log(4))
    assert 1 <= gates["worst_load_imbalance"] <= 4
    assert "gates" not in report["teacher"]
    assert "| gates of |" in (directory / "report.md").read_text().replace("  ", " ")
    # A copy of the teacher costs it once, and a merge of 2 for each of its sequences.
    assert report["student"]["ffn_flops_ratio"] == pytest.approx(1 + 2 / config.model.max_length)
    log = MetricLog(directory / "distill" / METRIC_LOG).read()
    names = {name for line in log for name in line.metrics}
    assert {"train/loss/load_balancing", "train/weighted_loss/load_balancing"} <= names
    for layer in gates["entropy"]:
        assert {f"moe/entropy/{layer}", f"moe/load_imbalance/{layer}"} <= names
        shares = report_loads(directory)[layer]
        assert sum(shares) == pytest.approx(1) and len(shares) == 4


def report_loads(directory: Path) -> dict[str, list[float]]:
    found = json.loads((directory / "evaluate" / "stage.json").read_text())
    loads: dict[str, list[float]] = found["details"]["expert_loads"]["student"]
    return loads


def test_neurons_that_merging_mixes_are_said_before_anything_starts(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings["moe"] = COPIES | {"partition": "token_clusters", "expert_size": 8}
    console = Recorder()
    run_chain(load_config(write_recipe(tiny_settings)), console, until="adapt")
    (line,) = [text for text in console.warned if "moe.partition" in text]
    assert "moe.partition=token_clusters gives experts different neurons" in line
    assert "its gates are not taken over" in line
