"""Several tasks in one run: the whole chain, its report, and what is exported from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_dist.config import load_config
from moe_dist.conversion import PartitionPlan, score_importance
from moe_dist.data.loaders import eval_batches
from moe_dist.data.retention import ratio
from moe_dist.errors import ConfigError
from moe_dist.inference import load_model, load_tokenizer
from moe_dist.metric_log import MetricLog, series
from moe_dist.moe.layer import moe_layers
from moe_dist.moe.routing import use_task
from pipelines.chain.chain import run_chain
from pipelines.chain.workspace import Workspace
from pipelines.cli import app
from pipelines.console import Console
from tests.pipelines.conftest import WORDS, write_sentences
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]


def write_grades(path: Path, *, count: int, offset: int = 0) -> None:
    """Pairs of texts with a number: regression."""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(offset, offset + count):
            first = " ".join(WORDS[(number * step + step) % len(WORDS)] for step in (1, 3, 5))
            second = " ".join(WORDS[(number * step + 2) % len(WORDS)] for step in (7, 11))
            row = {"one": first, "two": second, "grade": (number % 5) / 2}
            stream.write(json.dumps(row) + "\n")


@pytest.fixture
def settings(tmp_path: Path, tiny_settings: dict[str, Any]) -> dict[str, Any]:
    write_sentences(tmp_path / "train.jsonl", count=48)
    write_grades(tmp_path / "grades.jsonl", count=24)
    write_grades(tmp_path / "grades-dev.jsonl", count=9, offset=1000)
    mood = tiny_settings["data"]
    grades = {
        "source": "files",
        "train": str(tmp_path / "grades.jsonl"),
        "dev": str(tmp_path / "grades-dev.jsonl"),
        "text_columns": ["one", "two"],
        "label_column": "grade",
        "kind": "regression",
    }
    moe = {
        "num_experts": 4,
        "expert_size": 10,
        "num_shared_neurons": 4,
        "tie_shared": True,
        "router": "task_gate",
    }
    return tiny_settings | {
        "data": {"source": "tasks", "tasks": {"mood": mood, "grades": grades}},
        "moe": moe,
        "compare": ["dense"],
    }


def test_the_chain_trains_measures_and_exports_each_task(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(settings)
    first = Recorder()
    run_chain(load_config(recipe), first)
    assert len(first.ran) == 7
    root = tmp_path / "outputs/tiny"

    report = json.loads((root / "report.json").read_text())
    assert report["main_metric"] == "mean"
    student, teacher = report["student"], report["teacher"]
    assert set(student["metrics"]) == {
        "mean",
        "mood/accuracy",
        "grades/pearson",
        "grades/spearman",
    }
    assert student["metrics"]["mean"] == pytest.approx(
        (student["metrics"]["mood/accuracy"] + student["metrics"]["grades/pearson"]) / 2
    )
    by_task = student["retention_by_task"]
    assert by_task["mood"] == pytest.approx(
        student["metrics"]["mood/accuracy"] / teacher["metrics"]["mood/accuracy"]
    )
    # A teacher that has learned this little may be anti-correlated with the grades.
    grades = teacher["metrics"]["grades/pearson"]
    assert by_task["grades"] == ratio(
        student["metrics"]["grades/pearson"], grades, higher_is_better=True
    )
    if grades > 0:
        assert report["retention"] == pytest.approx(sum(by_task.values()) / 2)
    else:
        assert report["retention"] is None
        assert "retention/grades" in student["undefined"]["retention"]
        assert f"grades/pearson is {grades:.4g}" in student["undefined"]["retention/grades"]
    assert report["tasks"]["grades"]["num_dev_samples"] == 9
    assert set(report["tasks"]["mood"]["differences"]) == {"teacher", "dense"}
    text = (root / "report.md").read_text()
    assert "| grades | pearson | 9 samples |" in text

    # 72 rows in batches of 8: nine steps, of which the smaller task has its share.
    records = MetricLog(root / "distill/metrics.jsonl").read()
    assert report["training"]["distill"]["num_steps"] == 9
    assert series(records, "train/loss/task/mood")[1]
    assert series(records, "dev/grades/pearson")[0] == [9]

    again = Recorder()
    run_chain(load_config(recipe), again)
    assert again.ran == []

    directory = root / "distill/model"
    tokenizer = load_tokenizer(directory)
    for task, text_pair in (("mood", None), ("grades", "a great plot")):
        result = CliRunner().invoke(app, ["export", str(directory), "--task", task])
        assert result.exit_code == 0, result.output
        dense = load_model(root / f"export-distill-{task}")
        assert type(dense).__name__ == "BertForSequenceClassification"
        assert dense.config.intermediate_size == 10
        batch = tokenizer("the film was fine", text_pair, return_tensors="pt")
        whole = load_model(directory, task=task)
        with torch.no_grad():
            assert torch.allclose(dense(**batch).logits, whole(**batch).logits, atol=1e-5)
    assert dense.config.problem_type == "regression"

    again_there = CliRunner().invoke(app, ["export", str(directory), "--task", "mood"])
    assert again_there.exit_code != 0 and "is there already" in again_there.output
    unnamed = CliRunner().invoke(app, ["export", str(directory)])
    assert unnamed.exit_code != 0 and "grades, mood" in unnamed.output

    # How often tasks are drawn changes what is learned.
    changed = Recorder()
    mixing = ["data.mixing=temperature", "data.mixing_temperature=5", "compare=[]"]
    run_chain(load_config(recipe, mixing), changed, until="finetune-teacher")
    assert changed.ran == ["finetune-teacher"]


def test_experts_start_with_the_neurons_of_their_own_task(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Against the scores of each task alone, with all rows scored."""
    moe = settings["moe"] | {
        "num_experts": 2,
        "num_shared_neurons": 0,
        "tie_shared": False,
        "partition": "task_importance",
        "importance_samples": None,
    }
    config = load_config(write_recipe(settings | {"moe": moe, "compare": []}))
    run_chain(config, Recorder(), until="adapt")
    root = tmp_path / "outputs/tiny"
    plan = PartitionPlan.load(root / "adapt/plan.json")
    teacher = load_model(root / "finetune-teacher/model")
    workspace = Workspace(config, Console(quiet=True))
    parts = workspace.encoded_tasks("train", load_tokenizer(root / "finetune-teacher/model"))
    for task, encoded in enumerate(parts.values()):
        with use_task(task):
            scores = score_importance(teacher, eval_batches(encoded, batch_size=1))
        for part, score_F in zip(plan.partitions, scores, strict=True):
            assert set(part.expert_ids[task].tolist()) == set(score_F.topk(10).indices.tolist())


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"router": "token_gate"}, r"set moe\.router to task_gate"),
        ({"num_experts": 3}, r"more than the 2 that moe\.partition=task_importance"),
        ({"num_experts": 3, "top_k": 2}, ""),
    ],
)
def test_task_importance_is_for_task_gate(
    write_recipe: Write, settings: dict[str, Any], moe: dict[str, Any], said: str
) -> None:
    settings["moe"] |= {"num_experts": 2, "partition": "task_importance"} | moe
    recipe = write_recipe(settings)
    if not said:
        assert load_config(recipe).moe.partition == "task_importance"
        return
    with pytest.raises(ConfigError, match=said):
        load_config(recipe)


def test_task_importance_needs_several_tasks(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    moe = tiny_settings["moe"] | {"partition": "task_importance"}
    with pytest.raises(ConfigError, match=r"set data\.source to tasks"):
        load_config(write_recipe(tiny_settings | {"moe": moe}))


def test_a_dry_run_shows_the_tasks(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = str(write_recipe(settings))
    result = CliRunner().invoke(app, ["compress", recipe, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "tasks: grades (files), mood (files)" in result.output
    assert "samples, grades: 24 to train, 9 for dev, 33.3% of the steps" in result.output
    (tmp_path / "grades.jsonl").unlink()
    result = CliRunner().invoke(app, ["compress", recipe, "--dry-run"])
    assert f"data.tasks.grades.train={tmp_path}/grades.jsonl" in result.output


def test_what_is_wrong_with_all_tasks_data_is_said_at_once(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("train", "grades"):
        (tmp_path / f"{name}.jsonl").unlink()
    result = CliRunner().invoke(app, ["compress", str(write_recipe(settings))])
    assert result.exit_code != 0
    for task in ("mood", "grades"):
        assert f"task {task}: no such data file" in result.output


def test_a_student_of_several_tasks_is_compacted(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"compare": []}
    settings["moe"] |= {"num_experts": 3, "task_map": "fixed"}
    run_chain(load_config(write_recipe(settings)), Recorder(), until="distill")
    student = tmp_path / "outputs/tiny/distill/model"
    result = CliRunner().invoke(
        app, ["compact", str(student), "--num-experts", "2", "--repair-steps", "3"]
    )
    assert result.exit_code == 0, result.output
    output = student.parent.parent / "compact-2"
    found = json.loads((output / "compact.json").read_text())
    assert found["main_metric"] == "mean" and "mood/accuracy" in found["repaired"]["metrics"]
    old, new = load_model(student, task="mood"), load_model(output / "model", task="mood")
    for before, after, layer in zip(moe_layers(old), moe_layers(new), found["layers"], strict=True):
        groups, use = layer["groups"], layer["use"]
        # One expert of three has no task, so it is joined first.
        assert sum(use) == pytest.approx(1) and use.count(0) == 1
        assert [len(group) for group in groups if use.index(0) in group] == [2]
        assert before.router is not None and after.router is not None
        places = [next(i for i, group in enumerate(groups) if e in group) for e in range(3)]
        expected = torch.tensor(places)[before.router.state_dict()["table"]]
        assert torch.equal(after.router.state_dict()["table"], expected)


def test_each_task_s_merge_is_a_dense_model_and_the_average_is_measured_on_it(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    moe = {"num_experts": 3, "expert_size": 32, "num_shared_neurons": 0, "top_k": 2}
    merged = moe | {"partition": "full_copy", "router": "merged_task"}
    config = load_config(write_recipe(settings | {"moe": merged, "compare": []}))
    run_chain(config, Recorder(), until="distill")
    directory = Path(config.run_dir) / "distill" / "model"
    command = ["export", str(directory), "--task"]
    folded = CliRunner().invoke(app, [*command, "grades", "--fold"])
    assert folded.exit_code == 0, folded.output
    dense = load_model(Path(config.run_dir) / "export-distill-grades")
    batch = {"input_ids": torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(2))}
    with torch.no_grad():
        expected = load_model(directory, task="grades")(**batch).logits
        torch.testing.assert_close(dense(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    average = CliRunner().invoke(app, [*command, "mood", "--average"])
    assert average.exit_code == 0, average.output
    record = json.loads(
        (Path(config.run_dir) / "export-distill-mood-average/export.json").read_text()
    )
    assert set(record["metrics"]) == {"model", "export"}
    assert set(record["metrics"]["model"]) == set(record["metrics"]["export"]) == {"accuracy"}
