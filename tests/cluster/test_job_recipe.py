"""A recipe as a job sees it: the command, and what would not be found there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.job_recipe import CARRIED_RECIPE, JobRecipe
from cluster.packing import collect
from moe_dist.config import load_config, read_settings

LASTING = {"output_dir": "/shared/outputs", "tracking": {"uri": "http://host:5000"}}
DATA = {"source": "files", "train": "/shared/train.tsv", "dev": "/shared/dev.tsv"}
Make = Callable[..., JobRecipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    root = tmp_path / "checkout"
    (root / "pipelines").mkdir(parents=True)
    (root / "pipelines/__main__.py").touch()
    (root / "recipes").mkdir()

    def make(
        settings: dict[str, Any],
        overrides: Sequence[str] = (),
        where: str = "checkout/recipes/mine.yaml",
        **environment: str,
    ) -> JobRecipe:
        path = tmp_path / where
        path.write_text(yaml.safe_dump({"name": "x", "model": {"teacher": "bert"}} | settings))
        read = read_settings(path, overrides)
        return JobRecipe(path, overrides, read, collect(root), environment)

    return make


def test_the_command_repeats_what_was_given(make: Make) -> None:
    overrides = ["moe.layers=[0, 2]", "name=it's mine"]
    recipe = make(LASTING | {"data": DATA}, overrides)
    expected = ["python", "-m", "pipelines", "compress", "recipes/mine.yaml"]
    assert shlex.split(recipe.command) == [*expected, "--set", overrides[0], "--set", overrides[1]]
    assert recipe.carried == {}
    assert recipe.faults() == []


def test_a_recipe_from_elsewhere_is_carried_along(make: Make, tmp_path: Path) -> None:
    recipe = make(LASTING | {"data": DATA}, where="mine.yaml")
    assert CARRIED_RECIPE in shlex.split(recipe.command)
    (tmp_path / "carried.yaml").write_text(recipe.carried[CARRIED_RECIPE])
    assert load_config(tmp_path / "carried.yaml") == load_config(tmp_path / "mine.yaml")


def test_without_the_source_the_image_has_the_program(make: Make, tmp_path: Path) -> None:
    (tmp_path / "checkout/pipelines/__main__.py").unlink()
    words = shlex.split(make(LASTING | {"data": DATA}).command)
    assert words[:3] == ["python", "-m", "moe_dist._pipelines"]


def test_a_credential_that_an_override_replaces_is_sent_all_the_same(make: Make) -> None:
    planted = {"uri": "http://ann:planted@host:5000"}
    settings = LASTING | {"data": DATA, "tracking": planted}
    (fault,) = make(settings, ["tracking.uri=http://host:5000"]).faults()
    assert fault.startswith("mine.yaml is sent as it is") and "planted" not in fault


def test_half_a_program_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "checkout/moe_dist").mkdir()
    (tmp_path / "checkout/moe_dist/__init__.py").touch()
    assert make(LASTING | {"data": DATA}).faults() == []
    (tmp_path / "checkout/pipelines/__main__.py").unlink()
    (fault,) = make(LASTING | {"data": DATA}).faults()
    assert "without pipelines/" in fault


def test_a_tracking_uri_of_the_environment_is_handed_on(make: Make) -> None:
    settings = {"output_dir": "/shared", "data": DATA}
    recipe = make(settings, MLFLOW_TRACKING_URI="http://host:1")
    assert recipe.faults() == []
    assert shlex.split(recipe.command)[-2:] == ["--set", "tracking.uri=http://host:1"]
    assert len(make(settings).faults()) == 1
    assert make(settings | {"tracking": {"enabled": False}}).faults() == []


def test_all_faults_come_at_once(make: Make) -> None:
    faults = make({"data": DATA | {"train": "data/train.tsv"}}).faults()
    assert [fault.split()[0].split("=")[0] for fault in faults] == [
        "output_dir",
        "tracking.uri",
        "data.train",
    ]


@pytest.mark.parametrize("path", ["../train.tsv", "data/train.tsv", "~/train.tsv", "missing.tsv"])
def test_data_that_the_job_would_not_find_are_refused(make: Make, path: str) -> None:
    (fault,) = make(LASTING | {"data": DATA | {"train": path}}).faults()
    assert fault.startswith(f"data.train={path}") and "shared storage" in fault


def test_data_of_each_task_are_looked_at(make: Make) -> None:
    tasks = {"one": DATA, "two": DATA | {"train": "data/two.tsv"}}
    recipe = make(LASTING | {"data": {"source": "tasks", "tasks": tasks}})
    (fault,) = recipe.faults()
    assert fault.startswith("data.tasks.two.train=data/two.tsv") and "shared storage" in fault
    assert recipe.paths_on_cluster == [
        "data.tasks.one.train",
        "data.tasks.one.dev",
        "data.tasks.two.dev",
    ]


def test_data_at_uris_are_found_by_every_job(make: Make) -> None:
    data = DATA | {"train": "s3://bucket/train.tsv", "dev": "gs://bucket/dev.tsv"}
    recipe = make(LASTING | {"data": data})
    assert recipe.faults() == [] and recipe.paths_on_cluster == []


def test_data_and_models_that_go_along_are_fine(make: Make, tmp_path: Path) -> None:
    (tmp_path / "checkout/recipes/train.tsv").touch()
    (tmp_path / "checkout/tiny").mkdir()
    (tmp_path / "checkout/tiny/config.json").touch()
    data = DATA | {"train": "recipes/train.tsv"}
    assert make(LASTING | {"data": data, "model": {"teacher": "tiny"}}).faults() == []
    absolute = str(tmp_path / "checkout/recipes/train.tsv")
    (fault,) = make(LASTING | {"data": DATA | {"train": absolute}}).faults()
    assert "write it relative" in fault
    (fault,) = make(LASTING | {"data": DATA, "model": {"teacher": "./gone"}}).faults()
    assert fault.startswith("model.teacher=gone")


def test_files_that_only_the_cluster_has_are_named(make: Make) -> None:
    recipe = make(LASTING | {"data": DATA, "model": {"teacher": "/shared/bert"}})
    assert recipe.paths_on_cluster == ["data.train", "data.dev", "model.teacher"]


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=http://ann:planted@host:5000",
        "tracking.uri=postgresql://ann:planted@host/db",
        "tracking.uri=http://host/?token=planted",
        "data.train=/shared/train.tsv?token=planted",
        "output_dir=s3://bucket/x?secret=planted",
        "data.name=hf_plantedplantedplanted",
        "compare.other={data.train: 'https://ann:planted@host/x'}",
        "data.text_columns=[text, 'https://ann:planted@host/x']",
    ],
)
def test_credentials_are_refused_and_not_repeated(make: Make, override: str) -> None:
    faults = make(LASTING | {"data": DATA}, [override]).faults()
    assert len(faults) == 1
    assert faults[0].startswith(override.partition("=")[0])
    assert "holds a" in faults[0]
    assert "planted" not in faults[0]
