"""What a run says of how its models answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.errors import ConfigError
from pipelines.console import Console
from pipelines.serving.recipe_settings import recipe_settings
from pipelines.serving.run import Serving, serving_settings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    recipe: dict[str, Any] = {
        "name": "questions",
        "output_dir": str(tmp_path),
        "model": {"teacher": "nobody/none", "max_length": 77},
        "data": {
            "source": "files",
            "kind": "question_answering",
            "train": str(rows),
            "dev": str(rows),
            "stride": 9,
        },
    }
    place = tmp_path / "questions"
    place.mkdir()
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = {"student": 0.5, "teacher": 0.25, "dense": 0.125}
    report = {name: {"calibrations": {"": value}} for name, value in found.items()}
    (place / "report.json").write_text(json.dumps(report))
    return place


@pytest.mark.parametrize(
    ("place", "calibration"),
    [
        ("distill/model", 0.5),
        ("finetune-teacher/model", 0.25),
        ("compare/dense/distill/model", 0.125),
        ("compact/model", None),
        ("compare/dense/adapt/model", None),
    ],
)
def test_length_options_and_threshold_are_those_of_the_run(
    run: Path, place: str, calibration: float | None
) -> None:
    found, said = recipe_settings(str(run / place), None)
    assert found["max_length"] == 77 and found["options"]["stride"] == 9
    assert found.get("calibration") == calibration
    assert said == f"length and options are those of {run / 'recipe.yaml'}"


def test_what_is_asked_for_comes_first(run: Path) -> None:
    values = {"form": "eager-fp32"}
    directory = str(run / "distill/model")
    found = serving_settings(Serving(directory, values), Console(quiet=True))
    assert (found.max_length, found.form, found.calibration) == (77, "eager-fp32", 0.5)
    found = serving_settings(Serving(directory, values, max_length=5), Console(quiet=True))
    assert found.max_length == 5
    with pytest.raises(ConfigError, match="threads"):
        serving_settings(Serving(directory, {"threads": 0}), Console(quiet=True))


def test_without_a_run_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = serving_settings(Serving(str(tmp_path / "model"), {}), Console())
    assert found.max_length is None and found.options == {}
    assert "no recipe lies above the model" in capsys.readouterr().err
    assert recipe_settings("s3://bucket/questions/distill/model", None)[0] == {}
