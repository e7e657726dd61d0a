"""The report has the keys that others read, and people can read it too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.chain.stage import StageResult
from pipelines.console import quantity
from pipelines.report.report import build_report, headline_metrics, verdict
from pipelines.report.report_text import (
    latency_lines,
    nearness_lines,
    to_markdown,
    to_tables,
    verdict_lines,
)
from pipelines.stages.evaluate import describe_gates


def entry(accuracy: float, ffn: float, before: float | None = None) -> dict[str, Any]:
    """One model's figures as the evaluate stage finds them."""
    made: dict[str, Any] = {
        "metrics": {"accuracy": accuracy},
        "parameters": {"total": 22_700_000, "active": 18_000_000},
        "flops_per_token": 2.1e7,
        "ffn_flops_per_token": ffn,
        "latency_ms": {"1": 4.2, "32": 101.0},
        "latency_low_ms": {"1": 4.1, "32": 99.0},
        "latency_spread": {"1": 0.1, "32": 0.05},
        "fastest": {
            size: {"form": "lean-bf16", "latency_low_ms": 2.0, "latency_spread": 0.1}
            for size in ("1", "32")
        },
    }
    if before is not None:
        made["metrics_before_distillation"] = {"accuracy": before}
    return made


def speeds(*others: str) -> dict[str, Any]:
    """What was measured of the student's speed against others."""
    level = {size: {"value": 1.1, "low": 1.1, "high": 1.1, "half": 10} for size in ("1", "32")}
    return {
        "speedups": dict.fromkeys(others, level),
        "left_out": ["onnx-int8 of student: no onnxruntime"],
        "tolerance": 0.05,
        "other_work": {"num_cores": 4, "busy_cores": 0.2, "disturbs": False},
        "timed": {"seq_len": 64, "num_threads": 2, "forms": "auto", "writes": False},
        "failed": None,
    }


def recipe(name: str, *compare: str) -> Any:
    return SimpleNamespace(
        name=name,
        compare={label: {} for label in compare},
        tracking=SimpleNamespace(experiment="moe-dist"),
        evaluate=SimpleNamespace(require_speedup=None),
    )


def result(stage: str, details: dict[str, Any] | None = None) -> StageResult:
    return StageResult(stage, "", Path("/nowhere"), "f", {}, {}, {}, details or {}, 12.3456)


@pytest.fixture
def report() -> dict[str, Any]:
    config = recipe("demo", "dense")
    difference = {"metric": "accuracy", "difference": 0.01, "low": -0.02, "high": 0.03}
    details = {
        "main_metric": "accuracy",
        "num_dev_samples": 1500,
        "seq_len": 64,
        "num_threads": 2,
        "other_work": {"num_cores": 4, "busy_cores": 0.2, "disturbs": False},
        "speeds": speeds("teacher", "dense"),
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
        "| student | lean-bf16 | 2.00 | 1.00 | lean-bf16 | 2.00 | 1.00 |",
        "- student pays; each model in its fastest form",
        "not counted as a fastest form: onnx-int8 of student: no onnxruntime.",
    ):
        assert piece in text


def test_gates_that_learn_have_a_table(report: dict[str, Any]) -> None:
    # A router without a gate says nothing, nor did reports of earlier versions.
    assert "entropy" not in to_markdown(report)
    report["student"]["gates"] = describe_gates(
        {"layer.0.in": 0.5, "layer.0.out": 1.0},
        {"layer.0.in": [0.5, 0.25, 0.25, 0.0], "layer.0.out": [0.25] * 4},
    )
    assert "| student | 0.75 of 1.39 | × 2.00 |" in to_markdown(report)


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


def test_a_warning_of_a_small_drift_shows_that_it_is_not_0(report: dict[str, Any]) -> None:
    small = {"difference": 4e-5, "low": 1.23456e-6, "high": 8e-5}
    report["student"]["imitation_change"] = {"hidden_error": small}
    (line,) = nearness_lines(report)
    assert "hidden error +4e-05, 95 % interval +1.23e-06 to +8e-05" in line


def test_the_console_table_has_a_row_for_each_model(report: dict[str, Any]) -> None:
    models, forms, stages = to_tables(report)
    assert forms.row_count == 3
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
    sentence = verdict("dense", entry, 1500, higher_is_better=True, unit="sample")
    assert sentence.startswith(f"{claim} (accuracy of student minus dense: {middle:+.4f}, 95 %")
    assert "one training run of each" in sentence


@pytest.mark.parametrize(
    ("low", "high", "claim"),
    [
        (-2.0, -0.5, "student beats dense"),
        (0.5, 2.0, "dense beats student"),
        (-0.5, 0.5, "student and dense cannot be told apart"),
    ],
)
def test_where_lower_is_better_less_wins(low: float, high: float, claim: str) -> None:
    entry = {"metric": "perplexity", "difference": (low + high) / 2, "low": low, "high": high}
    sentence = verdict("dense", entry, 60, higher_is_better=False, unit="document")
    assert sentence.startswith(f"{claim} on 60 dev documents (perplexity (lower is better) of")


def language_report() -> dict[str, Any]:
    """A report on perplexity."""
    config = recipe("lm")
    models = {"teacher": entry(0.8, 4e6), "student": entry(0.79, 1e6, before=0.7)}
    for name, value in (("teacher", 20.0), ("student", 25.0)):
        models[name]["metrics"] = {"perplexity": value}
    models["student"]["metrics_before_distillation"] = {"perplexity": 100.0}
    details = {
        "main_metric": "perplexity",
        "metric_titles": {"perplexity": "perplexity"},
        "higher_is_better": False,
        "columns": ["nll", "tokens"],
        "unit": "document",
        "num_dev_samples": 15,
        "seq_len": 64,
        "num_threads": 2,
        "other_work": {"num_cores": 4, "busy_cores": 0.2, "disturbs": False},
        "speeds": speeds("teacher"),
        "models": models,
        "differences": {
            "teacher": {"metric": "perplexity", "difference": 5.0, "low": 4.0, "high": 6.0}
        },
        "data": {"name": "text", "digest": "d"},
    }
    return build_report(config, {"evaluate": result("evaluate", details)}, run_id=None)


def test_a_report_on_perplexity_knows_that_lower_is_better() -> None:
    made = language_report()
    assert made["higher_is_better"] is False and made["columns"] == ["nll", "tokens"]
    assert made["retention"] == pytest.approx(20 / 25)
    assert made["student"]["ffn_flops_ratio"] == pytest.approx(0.25)
    assert made["verdicts"]["teacher"].startswith("teacher beats student on 15 dev documents")
    text = to_markdown(made)
    assert "| dev perplexity (lower is better) |" in text
    assert "15 dev documents. Made" in text and "bootstrap over the dev documents." in text


def test_retention_of_several_tasks_goes_by_each_ones_direction() -> None:
    models = {"teacher": entry(0.8, 4e6), "student": entry(0.79, 1e6, before=0.7)}
    config = recipe("two")
    keys = ("mean", "a/perplexity", "b/perplexity")
    models["teacher"]["metrics"] = dict(zip(keys, (15.0, 10.0, 20.0), strict=True))
    models["student"]["metrics"] = dict(zip(keys, (30.0, 20.0, 40.0), strict=True))
    models["student"]["metrics_before_distillation"] = models["student"]["metrics"]
    difference = {"metric": "perplexity", "difference": 10.0, "low": 9.0, "high": 11.0}
    about = {
        "main_metric": "perplexity",
        "higher_is_better": False,
        "num_dev_samples": 5,
        "metric_titles": {"perplexity": "perplexity"},
        "differences": {"teacher": difference},
    }
    details = {
        "main_metric": "mean",
        "higher_is_better": False,
        "num_dev_samples": 10,
        "seq_len": 64,
        "num_threads": 2,
        "other_work": {"num_cores": 4, "busy_cores": 0.2, "disturbs": False},
        "speeds": speeds("teacher"),
        "models": models,
        "differences": {"teacher": difference | {"metric": "mean"}},
        "tasks": {"a": about, "b": about},
        "data": {"name": "text", "digest": "d"},
    }
    made = build_report(config, {"evaluate": result("evaluate", details)}, run_id=None)
    assert made["student"]["retention_by_task"] == {"a": 0.5, "b": 0.5}
    assert made["retention"] == 0.5
    text = to_markdown(made)
    assert "- a: teacher beats student on 5 dev samples (perplexity (lower is better)" in text
    assert "| a | perplexity (lower is better) | 5 samples |" in text


def test_the_verdict_on_the_teacher_comes_last(report: dict[str, Any]) -> None:
    assert report["verdicts"] == {"dense": verdict_lines(report)[0]}
    verdicts = {"teacher": "t", "dense": "d", "gate": "g"}
    assert verdict_lines({"verdicts": verdicts}) == ["d", "g", "t"]


def undefined_report(teacher: float | None, student: float | None) -> dict[str, Any]:
    """A report on one metric of two classes, None where it is undefined."""
    config = recipe("odd")
    models = {"teacher": entry(0.8, 4e6), "student": entry(0.79, 1e6, before=0.7)}
    for name, value in (("teacher", teacher), ("student", student)):
        models[name]["metrics"] = {"f1": value}
        if value is None:
            models[name]["undefined"] = {"f1": f"f1 of ok of {name} is undefined: all is fraud"}
    models["student"]["metrics_before_distillation"] = {"f1": None}
    gap: dict[str, Any] = {"metric": "f1", "difference": None, "low": None, "high": None}
    details = {
        "main_metric": "f1",
        "metric_titles": {"f1": "f1 of ok"},
        "classes": {"names": ["fraud", "ok"], "positive": 1},
        "num_dev_samples": 15,
        "seq_len": 64,
        "num_threads": 2,
        "other_work": {"num_cores": 4, "busy_cores": 0.2, "disturbs": False},
        "speeds": speeds("teacher"),
        "models": models,
        "differences": {"teacher": gap | {"undefined": "f1 of ok of student is undefined: x"}},
        "data": {"name": "cards", "digest": "d"},
    }
    return build_report(config, {"evaluate": result("evaluate", details)}, run_id=None)


@pytest.mark.parametrize(
    ("teacher", "student", "why"),
    [
        (None, 0.5, "the teacher's f1 of ok is undefined"),
        (0.5, None, "the student's f1 of ok is undefined"),
        (-0.2, -0.19, "the teacher's f1 of ok is -0.2"),
        (0.0, 0.3, "the teacher's f1 of ok is 0"),
    ],
)
def test_what_is_undefined_is_null_with_a_sentence(
    teacher: float | None, student: float | None, why: str
) -> None:
    made = undefined_report(teacher, student)
    assert made["retention"] is made["student"]["retention"] is None
    assert why in made["student"]["undefined"]["retention"]
    assert made["verdicts"]["teacher"].startswith("student and teacher cannot be compared: f1 of")
    shown = headline_metrics(made)
    assert "retention" not in shown and ("student/f1" in shown) == (student is not None)
    text = to_markdown(made)
    assert f"- student: retention is undefined: {why}" in text
    assert "| dev f1 of ok |" in text and "| undefined |" in text
    assert to_tables(made)


def test_resamples_that_were_left_out_are_counted() -> None:
    found = {"metric": "f1", "difference": 0.1, "low": 0.0, "high": 0.2, "num_undefined": 7}
    assert "7 resamples where it is undefined are left out" in verdict(
        "dense", found, 60, higher_is_better=True, unit="sample"
    )


def test_latencies_that_cannot_be_judged_are_named(report: dict[str, Any]) -> None:
    assert latency_lines(report) == []
    assert "cannot be judged" not in to_markdown(report)
    assert "4.20 (4.10)" in to_markdown(report)
    report["student"]["latency_spread"]["32"] = 0.51
    report["other_work"] = {"num_cores": 2, "busy_cores": 1.83, "disturbs": True}
    wide, beside = latency_lines(report)
    assert "cannot be judged" in wide and "student at batch 32 (51 %)" in wide
    assert "teacher" not in wide and "1.8 of 2 cores" in beside
    assert "**Latency cannot be judged" in to_markdown(report)
