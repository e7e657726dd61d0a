"""A smaller student through the whole chain: what runs, what is reported, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.errors import ConfigError
from moe_dist.inference import load_model
from moe_dist.metric_log import MetricLog
from pipelines.chain.chain import plan_steps, run_chain
from pipelines.chain.workspace import Workspace
from pipelines.checks.sizes import derive_sizes
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]
STUDENT = {"num_layers": 1, "hidden_size": 12, "intermediate_size": 20}
LOSSES = {
    "soft_weight": 1,
    "attention_weight": 1,
    "alignment_weight": 1,
    "mapping_weight": 0.5,
    "adversarial_weight": 0.1,
    "temperature": 2,
}


@pytest.fixture
def settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    """A small student of two experts with every loss, beside a plain dense one."""
    return tiny_settings | {
        "student": STUDENT,
        "moe": {"num_experts": 2, "expert_size": 12, "num_shared_neurons": 4},
        "distill": LOSSES,
        "compare": {
            "plain": {"moe.num_experts": 1, "moe.expert_size": 20, "moe.num_shared_neurons": 0},
            "whole": {"student": dict.fromkeys(STUDENT), "distill.hidden_layers": 2},
        },
    }


def test_steps_hold_the_stage_for_smaller_students_only(
    write_recipe: Write, settings: dict[str, Any]
) -> None:
    config = load_config(write_recipe(settings))
    assert [step.key for step in plan_steps(config)] == [
        "finetune-teacher",
        "score-importance",
        "shrink",
        "adapt",
        "distill",
        "shrink/plain",
        "adapt/plain",
        "distill/plain",
        "adapt/whole",
        "distill/whole",
        "evaluate",
    ]


def test_the_chain_makes_measures_and_reports_small_students(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = load_config(write_recipe(settings))
    first = Recorder()
    run_chain(config, first, until="evaluate")
    root = tmp_path / "outputs/tiny"
    report = json.loads((root / "report.json").read_text())
    assert report["student"]["shape"] == {"num_layers": 1, "hidden_size": 12}
    assert report["whole"]["shape"] == report["teacher"]["shape"]
    assert report["student"]["parameters"]["total"] < report["teacher"]["parameters"]["total"]
    assert "1 × 12" in (root / "report.md").read_text()

    student = load_model(root / "distill/model")
    assert type(student).__name__ == "MoeBertForSequenceClassification"
    plain = load_model(root / "compare/plain/distill/model")
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert {type(one).__module__.split(".")[0] for one in plain.modules()} <= {
        "transformers",
        "torch",
    }
    sizes = derive_sizes(config, Workspace(config, Recorder()))
    assert [model.total for model in sizes.models] == [
        report[name]["parameters"]["total"] for name in ("teacher", "student", "plain", "whole")
    ]

    logged = {
        name
        for record in MetricLog(root / "distill/metrics.jsonl").read()
        for name in record.metrics
    }
    terms = {"task", "prediction_kl", "hidden_mse", "soft_targets", "attention_mse"}
    terms |= {"alignment_mse", "mapping_mse", "adversarial"}
    for term in terms:
        assert {f"train/loss/{term}", f"train/weighted_loss/{term}"} <= logged
    assert "train/adversarial/right_about_teacher" in logged

    again = Recorder()
    changed = {"distill.adversarial_learning_rate": 1e-4}
    run_chain(
        load_config(write_recipe(settings), [f"{key}={value}" for key, value in changed.items()]),
        again,
        until="distill",
    )
    assert again.ran == ["distill"]
    assert again.skipped == ["finetune-teacher", "score-importance", "shrink", "adapt"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student.num_layers=3"], "student.num_layers=3 does not fit a teacher of 2 layers"),
        (["student.hidden_size=15", "student.num_heads=2"], "use 14 or 16"),
        (["student.hidden_size=15"], "not divisible by 2 attention heads"),
        (["student.layer_map=[0]", "student.num_layers=2"], "names 1 layers"),
        (["student.layer_map=[1, 0]"], "not ascending"),
        (["student.layer_map=first"], "is no layer map"),
        (["student.num_heads=1", "student.hidden_size=8"], "head by head"),
        (["moe.expert_size=24", "moe.num_shared_neurons=24"], "24"),
        (["distill.hidden_layers=0"], "distill.hidden_layers"),
        (["compare.whole={student.num_layers: 5}"], "compare.whole: student.num_layers=5"),
    ],
)
def test_students_that_cannot_be_are_named_before_anything_starts(
    write_recipe: Write, settings: dict[str, Any], overrides: list[str], words: str
) -> None:
    recorder = Recorder()
    with pytest.raises(ConfigError) as caught:
        run_chain(load_config(write_recipe(settings), overrides), recorder, until="adapt")
    assert words in str(caught.value)
    assert not recorder.ran
