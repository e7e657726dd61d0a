"""Runs that differ in their seed: means, intervals over examples and seeds, and over tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moe_dist.errors import DataError, MissingInputError
from moe_dist.jobs.results import save_predictions
from pipelines.cli import app
from pipelines.report.nearness import Imitation, save_imitation
from pipelines.report.seeded_runs import SeededRun, read_runs
from pipelines.report.seeds import MEAN, compare_seeds
from pipelines.report.seeds_table import to_markdown, to_plain

NUM_EXAMPLES = 200


def write_run(
    directory: Path, *, right: Mapping[str, int], task: str = "toy", ids: str = "dev"
) -> Path:
    """Write what a finished run leaves, each model right on its first so many examples."""
    labels = np.arange(NUM_EXAMPLES) % 2
    for label, count in right.items():
        answers = np.where(np.arange(NUM_EXAMPLES) < count, labels, 1 - labels)
        save_predictions(
            directory / "evaluate" / "predictions" / f"{label.replace('/', '-')}.npz",
            logits=torch.zeros(NUM_EXAMPLES, 2),
            predictions=torch.from_numpy(answers),
            labels=labels,
            sample_ids=[f"{ids}-{number}" for number in range(NUM_EXAMPLES)],
        )
    names = [name for name in right if "/" not in name]
    report = {
        "main_metric": "accuracy",
        "data": {"name": task},
        "comparisons": [name for name in names if name not in ("teacher", "student")],
    }
    report |= {name: {"ffn_flops_ratio": 0.25} for name in names if name != "teacher"}
    report["teacher"] = {}
    (directory / "report.json").write_text(json.dumps(report))
    return directory


def read_one(directory: Path, *, before: bool = False) -> SeededRun:
    (run,) = read_runs(directory, before=before)
    return run


def seeds_of(
    root: Path, students: list[int], *, dense: int = 150, task: str = "toy"
) -> list[SeededRun]:
    return [
        read_one(
            write_run(
                root / f"{task}{seed}",
                right={
                    "teacher": 180,
                    "student": count,
                    "student/before_distillation": 100,
                    "dense": dense,
                },
                task=task,
            )
        )
        for seed, count in enumerate(students)
    ]


def test_means_are_those_of_the_runs(tmp_path: Path) -> None:
    rows = {row.label: row for row in compare_seeds(seeds_of(tmp_path, [150, 160, 170]))}
    assert list(rows) == ["teacher", "student", "dense"]
    student = rows["student"]
    assert student.num_seeds == 3
    assert student.quality == pytest.approx(0.8)
    assert student.spread == pytest.approx(0.05)
    assert student.before == pytest.approx(0.5)
    assert student.retention == pytest.approx(0.8 / 0.9)
    assert student.differences["dense"].difference == pytest.approx(0.05)
    assert rows["dense"].differences == {}
    assert rows["teacher"].before is rows["teacher"].retention is None


def write_language_run(directory: Path, perplexities: Mapping[str, float]) -> Path:
    """Write what a run leaves that is measured by perplexity; its labels are no numbers."""
    tokens = np.arange(10, 10 + NUM_EXAMPLES)
    for label, value in perplexities.items():
        figures = torch.tensor(np.stack([np.log(value) * tokens, tokens], 1), dtype=torch.float32)
        save_predictions(
            directory / "evaluate" / "predictions" / f"{label}.npz",
            logits=figures,
            predictions=figures[:, 0],
            labels=np.full(NUM_EXAMPLES, np.nan),
            sample_ids=[str(number) for number in range(NUM_EXAMPLES)],
        )
    report: dict[str, Any] = {
        "main_metric": "perplexity",
        "columns": ["nll", "tokens"],
        "data": {"name": "text"},
        "comparisons": ["dense"],
        "teacher": {},
        "student": {"ffn_flops_ratio": 0.25},
        "dense": {"ffn_flops_ratio": 0.25},
    }
    (directory / "report.json").write_text(json.dumps(report))
    return directory


def test_perplexities_are_compared_by_their_figures(tmp_path: Path) -> None:
    runs = [
        read_one(
            write_language_run(
                tmp_path / str(seed), {"teacher": 20.0, "student": student, "dense": 40.0}
            )
        )
        for seed, student in enumerate((24.0, 26.0))
    ]
    rows = {row.label: row for row in compare_seeds(runs)}
    student = rows["student"]
    assert student.quality == pytest.approx(25.0, rel=1e-5)
    assert student.retention == pytest.approx((20 / 24 + 20 / 26) / 2, rel=1e-5)
    assert not student.higher_is_better
    difference = student.differences["dense"]
    assert difference is not None and difference.difference == pytest.approx(-15.0, rel=1e-4)
    text = to_markdown(list(rows.values()))
    assert "| 25.000 ± 1.414 | 0.801 | -15.000 (" in text
    assert "Quality: perplexity (text; lower is better)." in text and "hundredths" not in text


def test_metrics_of_opposite_directions_have_no_mean(tmp_path: Path) -> None:
    language = write_language_run(tmp_path / "text", dict.fromkeys(["teacher", "student"], 20.0))
    report = json.loads((language / "report.json").read_text()) | {"comparisons": []}
    (language / "report.json").write_text(json.dumps(report))
    rows = compare_seeds([read_one(language), *seeds_of(tmp_path, [150])], ["teacher"])
    assert MEAN not in {row.task for row in rows}
    text = to_markdown(rows)
    assert "Quality: accuracy (toy), in hundredths." in text
    assert "have no mean: they differ in direction or unit" in text


def test_the_spread_of_seeds_widens_the_interval(tmp_path: Path) -> None:
    steady = compare_seeds(seeds_of(tmp_path / "a", [160, 160, 160]))
    lucky = compare_seeds(seeds_of(tmp_path / "b", [140, 160, 180]))
    (narrow, wide) = (
        next(row for row in rows if row.label == "student").differences["dense"]
        for rows in (steady, lucky)
    )
    assert narrow.difference == pytest.approx(wide.difference)
    assert narrow.low > 0 > wide.low


def test_tasks_are_averaged_and_the_mean_is_surer_than_each(tmp_path: Path) -> None:
    runs = seeds_of(tmp_path, [160, 161], task="one") + seeds_of(tmp_path, [156, 155], task="two")
    rows = compare_seeds(runs, ["dense"])
    found = {row.task: row for row in rows if row.label == "student"}
    assert list(found) == ["one", "two", MEAN]
    assert found[MEAN].quality == pytest.approx((found["one"].quality + found["two"].quality) / 2)
    mean = found[MEAN].differences["dense"]
    single = found["one"].differences["dense"]
    assert mean.difference == pytest.approx(0.04)
    assert mean.high - mean.low < single.high - single.low
    assert "mean over tasks | student | 2 | × 0.250" in to_markdown(rows)


def test_each_task_of_a_run_counts_by_itself_and_seeds_stay_together(tmp_path: Path) -> None:
    runs = []
    for seed, (first, second) in enumerate([(140, 170), (170, 140)]):
        directory = tmp_path / f"both{seed}"
        for task, count in (("one", first), ("two", second)):
            write_run(tmp_path / "part", right={"teacher": 180, "student": count, "dense": 150})
            place = directory / "evaluate" / "predictions" / task
            place.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "part/evaluate/predictions").rename(place)
        report = json.loads((tmp_path / "part/report.json").read_text())
        about = {"main_metric": "accuracy"}
        report |= {"main_metric": "mean", "tasks": {"one": about, "two": about}}
        (directory / "report.json").write_text(json.dumps(report))
        runs += read_runs(directory)
    found = {row.task: row for row in compare_seeds(runs) if row.label == "student"}
    assert list(found) == ["one", "two", MEAN]
    assert found["one"].quality == found[MEAN].quality == pytest.approx(0.775)
    # A seed that is good at one task is bad at the other, and their mean hardly differs.
    alone, both = found["one"].differences["dense"], found[MEAN].differences["dense"]
    assert alone.difference == both.difference == pytest.approx(0.025)
    assert both.high - both.low < 0.7 * (alone.high - alone.low)


def test_a_model_that_some_runs_lack_is_compared_where_it_is(tmp_path: Path) -> None:
    runs = seeds_of(tmp_path, [160, 160])
    extra = {"teacher": 180, "student": 160, "dense": 150, "gate": 170}
    runs.append(read_one(write_run(tmp_path / "more", right=extra)))
    gate = next(row for row in compare_seeds(runs) if row.label == "gate")
    assert (gate.num_seeds, gate.spread) == (1, None)
    assert gate.differences["dense"].difference == pytest.approx(0.1)


def test_without_a_dense_student_the_teacher_is_the_reference(tmp_path: Path) -> None:
    runs = [read_one(write_run(tmp_path / "run", right={"teacher": 180, "student": 160}))]
    student = compare_seeds(runs)[1]
    assert student.differences["teacher"].difference == pytest.approx(-0.1)


def test_an_unknown_reference_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"called gate(.|\n)*teacher, student, dense"):
        compare_seeds(seeds_of(tmp_path, [160]), ["gate"])


def test_different_dev_rows_are_not_compared(tmp_path: Path) -> None:
    right = {"teacher": 180, "student": 160}
    runs = [
        read_one(write_run(tmp_path / name, right=right, ids=name)) for name in ("first", "second")
    ]
    with pytest.raises(DataError, match="different dev rows of toy"):
        compare_seeds(runs)


def test_the_command_prints_and_writes_the_table(tmp_path: Path) -> None:
    seeds_of(tmp_path, [160, 162])
    runs = [str(tmp_path / "toy0"), str(tmp_path / "toy1")]
    page = tmp_path / "table.md"
    result = CliRunner().invoke(app, ["seeds", *runs, "--against", "teacher", "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert "| toy | student | 2 | × 0.250 | 50.0 | 80.5 ± 0.7 |" in result.output
    assert page.read_text() in result.output
    plain = json.loads(CliRunner().invoke(app, ["seeds", *runs, "--json"]).output)
    assert plain[1]["differences"]["dense"]["difference"] == pytest.approx(0.055)


def test_students_are_compared_before_distillation_when_asked(tmp_path: Path) -> None:
    right = {"teacher": 180, "student": 160, "student/before_distillation": 100}
    right |= {"dense": 150, "dense/before_distillation": 90}
    run = read_one(write_run(tmp_path / "run", right=right), before=True)
    rows = {row.label: row for row in compare_seeds([run], ["dense"])}
    assert (rows["student"].quality, rows["student"].before) == (0.5, None)
    assert rows["student"].differences["dense"].difference == pytest.approx(0.05)
    assert rows["teacher"].quality == pytest.approx(0.9)


def test_students_are_compared_by_their_distance_from_the_teacher(tmp_path: Path) -> None:
    right = {"teacher": 180, "student": 160, "dense": 150}
    right |= {f"{name}/before_distillation": 140 for name in ("student", "dense")}
    paths = [write_run(tmp_path / f"toy{seed}", right=right) for seed in range(2)]
    command = ["seeds", *map(str, paths), "--measure", "hidden_error"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code != 0 and "holds no hidden_error" in result.output
    for seed, path in enumerate(paths):
        far = np.linspace(0.2, 0.4, NUM_EXAMPLES, dtype=np.float32)
        errors = {"student": far + 0.1 * seed, "dense": far + 0.1 * seed + 0.05}
        errors |= {f"{name}/before_distillation": 2 * values for name, values in errors.items()}
        imitation = Imitation({"": {"hidden_error": errors, "prediction_error": {}}})
        save_imitation(imitation, path / "evaluate" / "predictions")
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in json.loads(result.output)}
    assert rows["teacher"]["quality"] == 0
    assert rows["student"]["quality"] == pytest.approx(0.35)
    assert rows["student"]["before"] == pytest.approx(0.7)
    found = rows["student"]["differences"]["dense"]
    assert found["difference"] == pytest.approx(-0.05)
    assert found["low"] == pytest.approx(-0.05) and found["high"] == pytest.approx(-0.05)
    result = CliRunner().invoke(app, [*command, "--before", "--json"])
    rows = {row["label"]: row for row in json.loads(result.output)}
    assert rows["student"]["quality"] == pytest.approx(0.7)
    result = CliRunner().invoke(app, [*command[:-1], "luck"])
    assert result.exit_code == 2 and "hidden_error or prediction_error" in result.output


def test_a_run_named_twice_is_not_two_seeds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "toy", right={"teacher": 180, "student": 160, "dense": 150})
    result = CliRunner().invoke(
        app, ["seeds", str(run), f"{run.parent}/./toy", "--measure", "luck"]
    )
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert "is named 2 times" in output and "--measure=luck is not known" in output


def test_an_unfinished_run_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["seeds", str(tmp_path)])
    assert result.exit_code != 0
    assert "holds no finished run" in result.output


def test_student_t_over_seeds_stands_beside_the_bootstrap(tmp_path: Path) -> None:
    rows = compare_seeds(seeds_of(tmp_path, [140, 160, 180]), ["dense"])
    found = next(row for row in rows if row.label == "student").differences["dense"]
    assert found is not None and found.over_seeds is not None
    # By seed -0.05, +0.05 and +0.15: 4.303 standard errors of 0.1 / sqrt(3).
    assert found.over_seeds == pytest.approx((0.05 - 0.2484, 0.05 + 0.2484), abs=1e-3)
    assert (found.low, found.high) == found.over_seeds
    table = to_markdown(rows)
    assert "| +5.0 (-19.8 to +29.8) | " in table and "| -19.8 to +29.8 |" in table
    assert "the bootstrap alone covers too little" in table
    assert "one training run" not in table.casefold()


def test_one_seed_is_called_one_training_run(tmp_path: Path) -> None:
    table = to_markdown(compare_seeds(seeds_of(tmp_path, [160]), ["dense"]))
    assert "| one training run |" in table and "may be the luck of that run" in table


def test_what_is_undefined_for_a_seed_is_said(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "odd", right={"teacher": 180, "student": 160})
    report = json.loads((directory / "report.json").read_text())
    report |= {"main_metric": "f1", "classes": {"names": ["ok", "fraud"], "positive": 0}}
    (directory / "report.json").write_text(json.dumps(report))
    assert read_one(directory).title == "f1 of ok"
    for name in ("teacher", "student"):
        save_predictions(
            directory / "evaluate" / "predictions" / f"{name}.npz",
            logits=torch.zeros(6, 2),
            predictions=torch.tensor([0, 1, 1, 1, 1, 1]),
            labels=np.ones(6, int),
            sample_ids=list("abcdef"),
        )
    rows = compare_seeds([read_one(directory)])
    assert np.isnan(rows[1].quality) and rows[1].retention is None
    assert rows[1].differences == {"teacher": None}
    assert to_plain(rows[1])["quality"] is None
    assert rows[1].undefined is not None and "none of the 6 labels is 'ok'" in rows[1].undefined
    assert to_markdown(rows).count("undefined") >= 5
