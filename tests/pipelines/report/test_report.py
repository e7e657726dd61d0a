"""The report has the keys that others read, and people can read it too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.chain.stage import StageResult
from pipelines.report.report import (
    build_report,
    headline_metrics,
    nearness_lines,
    quantity,
    to_markdown,
    to_tables,
    verdict,
    verdict_lines,
)


def entry(accuracy: float, ffn: float, before: float | None = None) -> dict[str, Any]:
    """One model's figures as the evaluate stage finds them."""
    made: dict[str, Any] = {
        "metrics": {"accuracy": accuracy},
        "parameters": {"total": 22_700_000, "active": 18_000_000},
        "flops_per_token": 2.1e7,
        "ffn_flops_per_token": ffn,
        "latency_ms": {"1": 4.2, "32": 101.0},
    }
    if before is not None:
        made["metrics_before_distillation"] = {"accuracy": before}
    return made


def result(stage: str, details: dict[str, Any] | None = None) -> StageResult:
    return StageResult(stage, "", Path("/nowhere"), "f", {}, {}, {}, details or {}, 12.3456)


@pytest.fixture
def report() -> dict[str, Any]:
    config: Any = SimpleNamespace(
        name="demo",
        compare={"dense": {}},
        tracking=SimpleNamespace(experiment="moe-dist"),
    )
    difference = {"metric": "accuracy", "difference": 0.01, "low": -0.02, "high": 0.03}
    details = {
        "main_metric": "accuracy",
        "num_dev_samples": 1500,
        "seq_len": 64,
        "num_threads": 2,
        "models": {
            "teacher": entry(0.8, 4e6),
            "student": entry(0.79, 1e6, before=0.7),
            "dense": entry(0.78, 1e6, before=0.72),
        },
        "differences": {"dense": difference},
        "data": {"name": "movies", "digest": "d"},
    }
    facts = {"num_steps": 568, "resumed_from": None, "peak_memory_gib": 1.5}
    results = {"distill": result("distill", facts), "evaluate": result("evaluate", details)}
    return build_report(config, results, run_id="abc")


def test_the_keys_that_others_rely_on_are_there(report: dict[str, Any]) -> None:
    assert report["retention"] == pytest.approx(0.79 / 0.8)
    assert report["seconds"] == {"distill": 12.35, "evaluate": 12.35}
    assert report["mlflow"]["run_id"] == "abc"
    for name in ("teacher", "student", "dense"):
        model = report[name]
        assert model["metrics"]["accuracy"] > 0.7
        assert model["parameters"]["total"] > model["parameters"]["active"] > 0
        assert model["flops_per_token"] > 0
        assert set(model["latency_ms"]) == {"1", "32"}
    assert report["student"]["ffn_flops_ratio"] == pytest.approx(0.25)
    assert report["student"]["metrics_before_distillation"] == {"accuracy": 0.7}
    assert report["comparisons"] == ["dense"]
    assert report["training"] == {
        "distill": {"num_steps": 568, "resumed_from": None, "peak_memory_gib": 1.5}
    }


def test_markdown_names_every_model_and_the_verdict(report: dict[str, Any]) -> None:
    text = to_markdown(report)
    for piece in (
        "| teacher |",
        "| student |",
        "| dense |",
        "cannot be told apart",
        "-0.0200 to +0.0300",
        "× 0.250",
    ):
        assert piece in text


def nearness(hidden: float | None) -> dict[str, Any]:
    found = {"hidden_error": hidden, "prediction_error": 0.05}
    return {"imitation": found, "imitation_before_distillation": found}


def test_it_says_which_student_is_nearer_to_the_teacher(report: dict[str, Any]) -> None:
    # Reports of earlier versions hold nothing of it.
    assert "Hidden error" not in to_markdown(report)
    report["student"] |= nearness(0.125)
    report["dense"] |= nearness(None)
    report["imitation_differences"]["dense"] = {
        "hidden_error": {"difference": -0.01, "low": -0.02, "high": -0.005},
        "prediction_error": {"difference": 0.01, "low": -0.02, "high": 0.03},
    }
    text = to_markdown(report)
    assert "| student | 0.1250 | 0.1250 | 0.0500 | 0.0500 |" in text
    assert "| dense |  |  | 0.0500 | 0.0500 |" in text
    assert "student is nearer to the teacher than dense (hidden error of" in text
    del report["imitation_differences"]["dense"]["hidden_error"]
    text = to_markdown(report)
    assert "student and dense are equally near to the teacher (prediction error of" in text
    assert headline_metrics(report)["student/hidden_error"] == 0.125
    assert "dense/hidden_error" not in headline_metrics(report)


def test_it_warns_of_a_student_that_left_its_teacher(report: dict[str, Any]) -> None:
    report["student"] |= nearness(0.125) | {
        "imitation_change": {
            "hidden_error": {"difference": 0.02, "low": 0.01, "high": 0.03},
            "prediction_error": {"difference": 0.01, "low": -0.01, "high": 0.03},
        }
    }
    report["dense"] |= nearness(0.125) | {
        "imitation_change": {"hidden_error": {"difference": -0.02, "low": -0.03, "high": -0.01}}
    }
    (line,) = nearness_lines(report)
    assert line.startswith(
        "distillation led student away from its teacher (hidden error +0.0200, 95 % interval "
        "+0.0100 to +0.0300; prediction error +0.0100, 95 % interval -0.0100 to +0.0300); "
    )
    assert line in to_markdown(report)
    # Nearer by its predictions, which may be all that it was trained on.
    change = report["student"]["imitation_change"]["prediction_error"]
    change |= {"difference": -0.02, "low": -0.03, "high": -0.01}
    assert nearness_lines(report) == []


def test_the_console_table_has_a_row_for_each_model(report: dict[str, Any]) -> None:
    models, stages = to_tables(report)
    assert models.row_count == 3
    assert stages.row_count == len(report["seconds"]) + 1


def test_headline_metrics_are_numbers(report: dict[str, Any]) -> None:
    metrics = headline_metrics(report)
    assert metrics["student/accuracy"] == 0.79
    assert metrics["dense/latency_ms_batch_32"] == 101.0
    assert all(isinstance(value, float | int) for value in metrics.values())


def test_quantities_carry_a_prefix() -> None:
    assert [quantity(n) for n in (12, 1500, 22_713_216, 3.2e9)] == [
        "12",
        "1.5 k",
        "22.7 M",
        "3.2 G",
    ]


@pytest.mark.parametrize(
    ("low", "high", "claim"),
    [
        (0.001, 0.02, "student beats dense on 1500 dev samples"),
        (-0.02, -0.001, "dense beats student on 1500 dev samples"),
        (-0.01, 0.02, "student and dense cannot be told apart on 1500 dev samples"),
        (0.0, 0.0, "student and dense cannot be told apart on 1500 dev samples"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(
    low: float, high: float, claim: str
) -> None:
    middle = (low + high) / 2
    entry = {"metric": "accuracy", "difference": middle, "low": low, "high": high}
    sentence = verdict("dense", entry, 1500)
    assert sentence.startswith(f"{claim} (accuracy of student minus dense: {middle:+.4f}, 95 %")
    assert "one training run of each" in sentence


def test_the_verdict_on_the_teacher_comes_last(report: dict[str, Any]) -> None:
    assert report["verdicts"] == {"dense": verdict_lines(report)[0]}
    verdicts = {"teacher": "t", "dense": "d", "gate": "g"}
    assert verdict_lines({"verdicts": verdicts}) == ["d", "g", "t"]
