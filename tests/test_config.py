"""Recipes: how they are read, and their plain forms; `test_config_faults` has what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
import typing
from pathlib import Path

import pydantic
import pytest
import yaml

from moe_dist.config import load_config
from tests.config_recipes import RECIPE, load, only_fault, write

# Reading


def test_defaults_fill_what_a_recipe_leaves_out(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.moe.num_experts, config.moe.expert_size) == (4, 768)
    assert config.train.learning_rate == 5e-5
    assert config.compare == {}


def test_overrides_are_yaml_and_later_ones_win(tmp_path: Path) -> None:
    config = load(
        tmp_path, "moe.top_k=3", "moe.top_k=2", "moe.layers=[0, 2]", "moe.tie_shared=true"
    )
    assert config.moe.top_k == 2
    assert config.moe.layers == (0, 2)
    assert config.moe.tie_shared is True


def test_an_override_may_name_a_section_that_the_recipe_leaves_empty(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RECIPE + "finetune:\n"), ["finetune.max_steps=3"])
    assert config.teacher_train.max_steps == 3


def test_an_override_may_hold_an_equals_sign(tmp_path: Path) -> None:
    uri = "postgresql://db/mlflow?sslmode=require"
    assert load(tmp_path, f"tracking.uri={uri}").tracking.uri == uri


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "0.00001", "'1e-5'", "10e-6"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    assert math.isclose(load(tmp_path, f"train.learning_rate={text}").train.learning_rate, 1e-5)


def test_yaml_words_and_odd_numbers_mean_what_they_look_like(tmp_path: Path) -> None:
    config = load(tmp_path, "data.label_names=[no, yes, off]", "seed=010", "name=2024-01-31")
    assert config.data.label_names == ("no", "yes", "off")
    assert config.seed == 10
    assert config.name == "2024-01-31"


def test_classes_may_be_named_by_numbers_and_one_column_may_stand_alone(tmp_path: Path) -> None:
    config = load(tmp_path, "data.label_names=[0, 1]", "data.text_columns=sentence")
    assert config.data.label_names == ("0", "1")
    assert config.data.text_columns == ("sentence",)


@pytest.mark.parametrize(("text", "size"), [("0.1", 0.1), ("1500", 1500)])
def test_dev_size_is_a_fraction_or_whole_rows(tmp_path: Path, text: str, size: float) -> None:
    config = load(tmp_path, f"data.dev_size={text}")
    for found in (config.data.dev_size, config.data.model_dump(mode="json")["dev_size"]):
        assert found == size
        assert type(found) is type(size)


def test_all_sections_are_frozen(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.moe.top_k = 2  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_paths_become_absolute_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load(
        tmp_path,
        "data={source: files, train: a.tsv, dev: sub/b.tsv}",
        "data.subset=null",
        "data.name=null",
        "model.teacher=encoder",
        "tracking.uri=sqlite:///runs/x.db",
    )
    assert config.output_dir == tmp_path / "outputs"
    assert config.run_dir == tmp_path / "outputs" / "tiny"
    assert config.data.train == str(tmp_path / "a.tsv")
    assert config.data.dev == str(tmp_path / "sub" / "b.tsv")
    assert config.model.teacher == str(tmp_path / "encoder")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/runs/x.db"


def test_uris_stay_as_they_are(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "output_dir=s3://bucket/out/?region=eu-west-1",
        "data={source: files, train: s3://bucket/a.tsv, dev: gs://other/b.tsv}",
        "data.subset=null",
        "data.name=null",
    )
    assert config.run_dir == "s3://bucket/out/tiny?region=eu-west-1"
    assert (config.data.train, config.data.dev) == ("s3://bucket/a.tsv", "gs://other/b.tsv")
    assert load(tmp_path, "output_dir=file:///shared/out").output_dir == Path("/shared/out")


def test_hub_names_and_splits_stay_as_they_are(tmp_path: Path) -> None:
    config = load(tmp_path, "data.dev=validation")
    assert config.model.teacher == "some/encoder"
    assert config.data.dev == "validation"


def test_tracking_uri_comes_from_recipe_then_environment_then_a_local_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path).tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert load(tmp_path).tracking.uri == "http://server:5000"
    assert load(tmp_path, "tracking.uri=http://other").tracking.uri == "http://other"


def test_databricks_takes_experiments_that_are_paths(tmp_path: Path) -> None:
    for uri in ("databricks", "databricks://work"):
        config = load(tmp_path, f"tracking.uri={uri}", "tracking.experiment=/Users/me/moe")
        assert config.tracking.uri == uri


def test_loading_imports_nothing_heavy() -> None:
    script = (
        "import sys, moe_dist.config\n"
        "heavy = {'torch', 'transformers', 'ray', 'mlflow', 'deepspeed', 'datasets', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert shown.stdout.strip() == "[]"


def test_the_choices_are_those_of_the_tables() -> None:
    from moe_dist.config.moe_section import PartitionName, RouterName
    from moe_dist.conversion import PARTITIONS
    from moe_dist.moe import ROUTERS
    from moe_dist.router_spec import ROUTER_FACTS

    assert typing.get_args(RouterName) == tuple(ROUTERS) == tuple(ROUTER_FACTS)
    assert typing.get_args(PartitionName) == tuple(PARTITIONS)


# Plain forms


def test_the_resolved_recipe_loads_to_the_same_settings(tmp_path: Path) -> None:
    config = load(tmp_path, "compare=[dense]", "moe.layers=[0, 2]", "data.dev_size=250")
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config


def test_flatten_gives_plain_values_under_dotted_keys(tmp_path: Path) -> None:
    flat = load(tmp_path, "compare=[dense]", "moe.layers=[0, 2]").flatten()
    assert flat["moe.top_k"] == 1
    assert flat["moe.layers"] == "[0, 2]"
    assert flat["train.max_steps"] == "null"
    assert flat["compare"] == '{"dense": {}}'
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())


@pytest.mark.parametrize("key", ["output_dir", "data.train"])
def test_a_uri_with_one_slash_is_no_directory(tmp_path: Path, key: str) -> None:
    text = RECIPE.partition("data:")[0]
    files = ["data.source=files", "data.train=train.tsv", "data.dev=dev.tsv"]
    columns = ["data.text_columns=text", "data.label_column=label"]
    place = f"{key}=s3:/ann:planted@bucket/x"
    fault = only_fault(tmp_path, *files, *columns, place, text=text)
    assert fault.startswith(f"{key} has one slash") and "write s3://" in fault
    assert "planted" not in fault
    assert load(tmp_path, f"output_dir={tmp_path}/s3:/x").output_dir == tmp_path / "s3:/x"


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        ("https://me:hunter2@server/api", "https://***@server/api"),
        ("https://me:hunt/er@hunter2@server", "https://***@server"),
        ("postgresql://db/x?password=hunter2&a=1", "postgresql://db/x?password=***&a=1"),
        ("http://server:5000", "http://server:5000"),
    ],
)
def test_secrets_of_the_tracking_uri_are_not_written(
    tmp_path: Path, uri: str, written: str
) -> None:
    config = load(tmp_path, f"tracking.uri={uri}")
    assert config.tracking.uri == uri
    assert "hunter2" not in config.to_yaml()
    assert config.flatten()["tracking.uri"] == written


def test_a_recipe_of_one_task_says_nothing_of_tasks(tmp_path: Path) -> None:
    config = load(tmp_path)
    young = {"tasks", "mixing", "mixing_temperature"}
    assert not young & set(yaml.safe_load(config.to_yaml())["data"])
    assert not {f"data.{key}" for key in young} & set(config.flatten())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.label_names=[ok, fraud]", "data.positive_label=frad"], "use ok or fraud"),
        (["data.label_names=[a, b, c]", "data.positive_label=a"], "data.label_names names 3"),
        (["data.kind=regression", "data.positive_label=a"], "data.kind=regression has none"),
        (["data.metrics=[accuracy]", "data.positive_label=a"], "which data.metrics has not"),
    ],
)
def test_a_positive_label_must_be_one_of_two_classes(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    assert words in only_fault(tmp_path, *overrides)


def test_a_positive_label_may_be_a_number(tmp_path: Path) -> None:
    wanted = ["data.label_names=[0, 1]", "data.positive_label=0", "data.metrics=[f1]"]
    assert load(tmp_path, *wanted).data.positive_label == "0"


def test_a_teacher_from_nothing_is_trained(tmp_path: Path) -> None:
    settings = ("model.teacher=scratch:tiny-gpt2", "finetune.num_epochs=0")
    assert "random weights" in only_fault(tmp_path, *settings)
    assert load(tmp_path, settings[0]).model.teacher == "scratch:tiny-gpt2"


def test_a_teacher_is_left_untrained_only_where_that_is_said(tmp_path: Path) -> None:
    assert "no teacher either" in only_fault(tmp_path, "train.num_epochs=0")
    kept = load(tmp_path, "train.num_epochs=0", "finetune.num_epochs=2")
    assert (kept.train.num_epochs, kept.teacher_train.num_epochs) == (0, 2)
