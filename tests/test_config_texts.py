"""Overrides mean what is written: text is taken whole, and what YAML would hide is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import build_config, load_config
from moe_dist.config.search_space import value_of
from moe_dist.errors import ConfigError
from tests.config_recipes import RECIPE, faults, load, only_fault

SURPRISES = [
    "#1", "run #3", "yes", "no", "on", "off", "true", "1:30", "0x10", "1_000", "007", "~", "a: b",
    "- x", "*x", "&x", "!x", "!!int 5", "%", "%x", "@", "@x", "`x", "x:", "2024-01-31", "1e-5",
    ".nan", "[x", "{x", "a, b", "x]", "'", '"', "it's", "|", "> x", "? x", "---", "...", "<<", "=",
    "3.10", "+1", "9" * 5000, "a'b\"c", "\\n", "#", "a=b",
]  # fmt: skip


@pytest.mark.parametrize("text", SURPRISES)
@pytest.mark.parametrize("key", ["tracking.experiment", "data.label_column", "data.revision"])
def test_the_value_of_a_text_is_taken_whole(tmp_path: Path, key: str, text: str) -> None:
    assert value_of(load(tmp_path, f"{key}={text}"), key) == text


@pytest.mark.parametrize("text", [text for text in SURPRISES if not text.startswith("[")])
@pytest.mark.parametrize("key", ["data.text_columns", "data.label_names"])
def test_so_is_a_single_name(tmp_path: Path, key: str, text: str) -> None:
    assert value_of(load(tmp_path, f"{key}={text}"), key) == (text,)


def test_a_place_is_text_too(tmp_path: Path) -> None:
    assert Path(load(tmp_path, "output_dir=/results #3").output_dir) == Path("/results #3")


@pytest.mark.parametrize(
    ("text", "value"),
    [("null", None), ("", None), ("'null'", "null"), ('" x"', " x"), ("'it''s'", "it's")],
)
def test_quotes_enclose_a_text_and_null_is_none(tmp_path: Path, text: str, value: Any) -> None:
    assert load(tmp_path, f"data.label_column={text}").data.label_column == value


def test_names_in_a_list_stay_as_they_are_written(tmp_path: Path) -> None:
    for prefix in ("data.label_names=", ""):
        listed = "[007, 1_000, +1, yes, 1:30, 0x10, 2024-01-31, '#1']"
        text = RECIPE if prefix else f"{RECIPE}  label_names: {listed}\n"
        (tmp_path / "recipe.yaml").write_text(text)
        config = load_config(tmp_path / "recipe.yaml", [prefix + listed] if prefix else [])
        assert config.data.label_names == (
            "007", "1_000", "+1", "yes", "1:30", "0x10", "2024-01-31", "#1",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size=8 # small", "holds a comment"),
        ("compare=dense #1", "holds a comment"),
        ("moe.router=#1", "holds a comment"),
        ("data.text_columns=[a, #b]", "data.text_columns"),
        ("train.batch_size=&x 8", "holds an anchor"),
        ("train.batch_size=!!int '8'", "holds a tag"),
        ("train.batch_size=--- 8", "holds the start of a document"),
        ("train.batch_size=*x", "holds an alias"),
        ("train.batch_size=0x10", "train.batch_size=0x10 is not a whole number"),
        ("train.batch_size=1:30", "train.batch_size=1:30 is not a whole number"),
        ("train.batch_size=1e3", "train.batch_size=1000.0 is not a whole number"),
        ("train.batch_size=2024-01-31", "train.batch_size=2024-01-31 is not a whole number"),
        ("train.learning_rate=0x10", "is not a number"),
        ("moe.tie_shared=yes", "moe.tie_shared=yes is not true or false"),
        ("parallel.use_gpu=off", "use one of auto, true, false"),
        ("moe.router=%x", "moe.router=%x"),
        ("moe.router=x:", "moe.router"),
    ],
)
def test_what_another_key_cannot_hold_is_refused(tmp_path: Path, override: str, words: str) -> None:
    assert words in only_fault(tmp_path, override)


@pytest.mark.parametrize(("text", "number"), [("1_000", 1000), ("010", 10), ("+8", 8)])
def test_a_number_is_in_base_ten(tmp_path: Path, text: str, number: int) -> None:
    batch_size = load(tmp_path, f"train.batch_size={text}").train.batch_size
    assert (batch_size, str(batch_size)) == (number, str(number))


def test_numbers_out_of_range_are_listed_all_at_once(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        "seed=" + "9" * 5000,
        "train.batch_size=100000000000000000000",
        "train.learning_rate=1e400",
        "train.num_epochs=10000000",
        "moe.num_experts=-" + "9" * 5000,
        "moe.layers=[0, 99999999999]",
        "parallel.num_workers=1000000",
        "parallel.wait_s=1e30",
        "distill.kl_weight=.nan",
        "student.num_heads=100000000000",
        "student.layer_map=[0, 99999999999]",
        "search.space={train.weight_decay: {uniform: [0, .inf]}}",
        "data.max_train_samples=10000000000",
        "distill.hidden_layers=99999999999",
    )
    paths = [fault.split("=")[0].split(":")[0] for fault in found]
    assert sorted(paths) == sorted(
        [
            "seed",
            "train.batch_size",
            "train.learning_rate",
            "train.num_epochs",
            "moe.num_experts",
            "moe.layers.1",
            "parallel.num_workers",
            "parallel.wait_s",
            "distill.kl_weight",
            "student.num_heads",
            "student.layer_map",
            "search.space.train.weight_decay",
            "data.max_train_samples",
            "distill.hidden_layers",
        ]
    )
    assert all(len(fault) < 250 for fault in found)


def test_a_huge_number_in_a_recipe_or_from_python_is_refused_too(tmp_path: Path) -> None:
    fault = only_fault(tmp_path, text=f"{RECIPE}seed: {'7' * 5000}\n")
    assert fault.startswith("seed=777") and "at most 4,294,967,295" in fault
    raw = {"name": "x", "model": {"teacher": "y"}, "data": {"source": "hub", "name": "z"}}
    with pytest.raises(ConfigError, match=r"seed=2\*\*16609 or more") as caught:
        build_config({**raw, "seed": 10**5000, "train": {"learning_rate": 10**5000}})
    assert len(caught.value.faults) == 2
