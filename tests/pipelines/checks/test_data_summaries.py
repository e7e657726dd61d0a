"""What the data hold is said before anything starts: in preflight, dry runs and the chain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli import app

Write = Callable[[dict[str, Any]], Path]
COMMANDS = (["preflight"], ["compress", "--dry-run"])
SAID = "48 to train, 16 for dev; 2 classes: negative 50.0%, positive 50.0%"


def run(recipe: Path, command: list[str]) -> str:
    result = CliRunner().invoke(app, [command[0], str(recipe), *command[1:]])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_rows_classes_and_cuts_are_said(
    command: list[str], write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    output = run(write_recipe(tiny_settings), command)
    assert SAID in output and "no rows cut at 16 tokens" in output
    assert "model.max_length" not in output
    tiny_settings["model"]["max_length"] = 6
    output = run(write_recipe(tiny_settings), command)
    # Six words, [CLS] and [SEP].
    expected = "cuts 48 of 48 training rows and 16 of 16 dev rows, by 2 tokens on average; the long"
    assert f"warning: data: model.max_length=6 {expected}" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_what_may_be_wrong_is_a_warning(
    command: list[str], write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings["data"]["dev"] = tiny_settings["data"]["train"]
    output = run(write_recipe(tiny_settings), command)
    assert "48 dev rows are training rows too" in output
    assert "warning: data: 48 of 48 dev rows are training rows too" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_long_comparison_of_rows_says_that_it_goes_on(
    command: list[str],
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe_dist.data.copies._SILENT_S", 0.0)
    rows = [{"text": f"{n} is word{n} of line{n}", "label": "ab"[n % 2]} for n in range(40)]
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_settings["data"] |= {"train": str(path), "dev": None, "dev_size": 8}
    assert "32 rows are compared with 8 for near copies" in run(
        write_recipe(tiny_settings), command
    )


def test_several_tasks_are_said_by_name(write_recipe: Write, tiny_settings: dict[str, Any]) -> None:
    task = tiny_settings["data"]
    tiny_settings["data"] = {"source": "tasks", "tasks": {"mood": task, "tone": dict(task)}}
    output = run(write_recipe(tiny_settings), ["preflight"])
    assert f"data of mood: files {task['train']}" in output and "data of tone: files" in output


def test_programs_get_it_as_values(
    write_recipe: Write, tiny_settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tiny_settings)
    result = CliRunner().invoke(app, ["preflight", str(recipe), "--json"])
    found = json.loads(result.stdout)["data"][""]
    assert found["train"]["class_counts"] == {"negative": 24, "positive": 24}
    assert found["dev"]["cut"]["num_cut"] == 0
    CliRunner().invoke(app, ["compress", str(recipe), "--dry-run", "--json"])
    sizes = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert sizes["event"] == "sizes" and sizes["data"][""] == found


def test_a_chain_says_it_and_the_report_keeps_it(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_settings["train"]["max_steps"] = 1
    tiny_settings["model"]["max_length"] = 6
    output = run(write_recipe(tiny_settings), ["compress"])
    assert output.index(SAID) < output.index("finetune-teacher")
    assert output.index("warning: data: model.max_length=6 cuts") < output.index("finetune-teacher")
    outputs = tmp_path / "outputs" / "tiny"
    data = json.loads((outputs / "report.json").read_text())["data"]
    summary = data["summaries"][""]
    assert summary["train"]["num_samples"] == 48
    assert summary["train"]["cut"]["num_cut"] == 48
    assert str(tmp_path) not in json.dumps(data)
    assert f"- {summary['figures']}" in (outputs / "report.md").read_text()
