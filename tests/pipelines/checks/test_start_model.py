"""What is wrong with a start model is said before anything starts, by every command alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_dist.config import RunConfig
from pipelines.chain.chain import run_chain
from pipelines.cli import app
from tests.inference.start_models import edit_weights, remove_tokenizer, write_start_model
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]
Spoil = Callable[[Path], None]


def _rename(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _wrap(directory: Path) -> None:
    edit_weights(directory, lambda weights: {f"module.{key}": weights[key] for key in weights})


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (remove_tokenizer, "no tokenizer"),
        (_rename, "no model.safetensors, only pytorch_model.bin"),
        (_wrap, "begin with 'module.'"),
    ],
)
@pytest.mark.parametrize(
    "command", [["preflight"], ["compress"], ["finetune-teacher"], ["compress", "--dry-run"]]
)
def test_a_spoilt_start_model_is_refused(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    command: list[str],
    spoil: Spoil,
    fault: str,
) -> None:
    directory = Path(shutil.copytree(tiny_settings["model"]["teacher"], tmp_path / "model"))
    spoil(directory)
    tiny_settings["model"]["teacher"] = str(directory)
    recipe = write_recipe(tiny_settings)
    result = CliRunner().invoke(app, [*command[:1], str(recipe), *command[1:]])
    assert result.exit_code == (1 if command == ["preflight"] else 2)
    assert fault in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "outputs" / "tiny").exists()


@pytest.mark.parametrize("command", [["preflight"], ["compress", "--dry-run"]])
def test_what_is_new_or_strange_is_said(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path, command: list[str]
) -> None:
    rows = [f'{{"text": "xyz{n} uvw", "label": "{"ab"[n % 2]}"}}\n' for n in range(40)]
    for key in ("train", "dev"):
        path = tmp_path / f"strange.{key}.jsonl"
        path.write_text("".join(rows[: 40 if key == "train" else 10]))
        tiny_settings["data"][key] = str(path)
    recipe = str(write_recipe(tiny_settings))
    result = CliRunner().invoke(app, [command[0], recipe, *command[1:]])
    said = " ".join(result.output.split())
    assert result.exit_code == 0
    assert "data: measured by accuracy" in said
    assert "start model: new: classifier.bias, classifier.weight" in said
    assert "does not know 100% of the tokens" in said


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_every_family_goes_through_the_whole_chain(
    tiny_settings: dict[str, Any], tmp_path: Path, family: str, hidden_weight: float
) -> None:
    tiny_settings["model"]["teacher"] = str(write_start_model(tmp_path / family, family))
    tiny_settings["distill"] = {"hidden_weight": hidden_weight}
    result = run_chain(RunConfig.model_validate(tiny_settings), Recorder())
    assert result.report_path is not None
    student = json.loads(result.report_path.read_text())["student"]
    # The student is near its teacher and not it; both stacks are compared.
    assert 0 < student["imitation"]["hidden_error"] < 1


def test_a_first_token_that_saw_nothing_is_no_sentence_vector(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_settings["model"]["teacher"] = str(write_start_model(tmp_path / "t5", "t5"))
    tiny_settings["distill"] = {"alignment_weight": 1.0}
    recipe = str(write_recipe(tiny_settings))
    refused = CliRunner().invoke(app, ["preflight", recipe])
    assert refused.exit_code == 1 and "alignment_pooling" in refused.output
    mean = ["--set", "distill.alignment_pooling=mean"]
    assert CliRunner().invoke(app, ["preflight", recipe, *mean]).exit_code == 0


def test_attention_of_other_families_is_refused_before_the_start(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_settings["model"]["teacher"] = str(write_start_model(tmp_path / "bart", "bart"))
    tiny_settings["distill"] = {"attention_weight": 1.0}
    refused = CliRunner().invoke(app, ["preflight", str(write_recipe(tiny_settings))])
    assert refused.exit_code == 1 and "attention_weight to 0" in " ".join(refused.output.split())


def test_pairs_must_end_where_the_model_reads(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    # This tokenizer ends single texts, and pairs not at all.
    tiny_settings["model"]["teacher"] = str(write_start_model(tmp_path / "t5", "t5"))
    recipe = str(write_recipe(tiny_settings))
    assert CliRunner().invoke(app, ["preflight", recipe]).exit_code == 0
    for key in ("train", "dev"):
        lines = (tmp_path / f"{key}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        text = "".join(json.dumps(row | {"other": row["text"]}) + "\n" for row in rows)
        (tmp_path / f"{key}.jsonl").write_text(text)
    tiny_settings["data"]["text_columns"] = ["text", "other"]
    refused = CliRunner().invoke(app, ["preflight", str(write_recipe(tiny_settings))])
    assert refused.exit_code == 1
    assert "at the end of a pair of texts" in " ".join(refused.output.split())
