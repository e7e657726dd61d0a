"""What is wrong with a start model is said before anything starts, by every command alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.inference.start_models import edit_weights, remove_tokenizer

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
    assert result.exit_code == 1
    assert fault in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "outputs" / "tiny").exists()


def test_what_is_new_or_strange_is_said(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [f'{{"text": "xyz{n} uvw", "label": "{"ab"[n % 2]}"}}\n' for n in range(40)]
    for key in ("train", "dev"):
        path = tmp_path / f"strange.{key}.jsonl"
        path.write_text("".join(rows[: 40 if key == "train" else 10]))
        tiny_settings["data"][key] = str(path)
    result = CliRunner().invoke(app, ["preflight", str(write_recipe(tiny_settings))])
    said = " ".join(result.output.split())
    assert result.exit_code == 0
    assert "start model: new: classifier.bias, classifier.weight" in said
    assert "does not know 100% of the tokens" in said
