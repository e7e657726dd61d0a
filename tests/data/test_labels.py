"""Labels that are refused or warned of, through the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.data.labels import MAX_VALUE, class_warnings
from moe_dist.data.sources import Splits, load_splits
from moe_dist.errors import DataError


def load(folder: Path, labels: list[Any], dev: list[Any] | None = None, **changes: Any) -> Splits:
    for name, own in (("train", labels), ("dev", labels if dev is None else dev)):
        rows = [json.dumps({"text": f"{name} {i}", "label": label}) for i, label in enumerate(own)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    arguments: dict[str, Any] = {
        "source": "files",
        "train": folder / "train.jsonl",
        "dev": folder / "dev.jsonl",
        "text_columns": ["text"],
    }
    return load_splits(**(arguments | changes))


@pytest.mark.parametrize(
    "label",
    [["a"], ["a", "b"], [], {"name": "a"}, [[0, 1]], "['a', 'b']", '["a"]', "{'a': 1}", "(0, 1)"],
)
@pytest.mark.parametrize("line", [1, 3])
def test_a_label_that_is_no_single_one_is_refused(tmp_path: Path, label: Any, line: int) -> None:
    labels: list[Any] = ["a", "b", "a"]
    labels[line - 1] = label
    with pytest.raises(DataError, match=rf"train\.jsonl, line {line}: the label is .*one label"):
        load(tmp_path, labels)
    if not isinstance(label, str):
        with pytest.raises(DataError, match=rf"dev\.jsonl, line {line}: the label is of type"):
            load(tmp_path, ["a", "b"], labels, label_names=["a", "b"])


def test_names_in_brackets_are_names(tmp_path: Path) -> None:
    assert load(tmp_path, ["[good]", "(bad)"]).task.label_names == ("(bad)", "[good]")


def test_a_list_as_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: label \[0\.5\] is not a finite number"):
        load(tmp_path, [0.5, [0.5]], kind="regression")


def test_numbers_with_a_comma_name_their_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"label '0,5' is not a finite number") as caught:
        load(tmp_path, [0.5, "0,5"], kind="regression")
    assert caught.value.remedy == "write decimals with a point"


def test_values_that_are_no_classes_name_their_remedy(tmp_path: Path) -> None:
    values = [i / 7 for i in range(30)]
    with pytest.raises(DataError, match=r"dev\.jsonl, line 1: label '5.5' is not in") as caught:
        load(tmp_path, values, [5.5])
    assert "data.kind=regression" in caught.value.remedy


@pytest.mark.parametrize("label", [1e39, -1e39, 2 * MAX_VALUE, "1e30", 10**400])
def test_numbers_that_training_cannot_hold_are_refused(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: label .*too large") as caught:
        load(tmp_path, [1.0, label], kind="regression")
    assert "divide the labels" in caught.value.remedy
    assert load(tmp_path, [1.0, MAX_VALUE], kind="regression").train["label"][1] == MAX_VALUE


def test_numbers_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: label 'inf' is not a finite number"):
        load(tmp_path, [1.0, "inf"], kind="regression")


@pytest.mark.parametrize("label", ["0", 1])
def test_ids_are_refused_where_names_were_found_in_rows(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"dev\.jsonl, line 2: label .*found in the tr") as caught:
        load(tmp_path, ["ham", "spam"], ["ham", label])
    assert "set data.label_names in the order of the numbers" in caught.value.remedy
    given = load(tmp_path, ["ham", "spam"], ["ham", label], label_names=["spam", "ham"])
    assert given.dev["label"][:] == [1, int(label)]


def test_a_number_too_long_for_an_id_is_a_name_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: label '9999"):
        load(tmp_path, ["a", "b"], ["9" * 5000], label_names=["a", "b"])


@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_half_a_character_is_refused_with_its_line(tmp_path: Path, names: list[str] | None) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: column 'label' holds half a char"):
        load(tmp_path, ["a", "b\ud83d"], label_names=names)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x \\ud83d\\ude00", "label": 0}\n{"text": "\\ude00 y", "label": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: column 'text' holds half a char"):
        load_splits(source="files", train=path, dev=path, text_columns=["text"])


@pytest.mark.parametrize(("text", "remedy"), [(["a", "b"], "join its parts"), ({}, "columns of")])
def test_a_text_that_is_none_names_its_remedy(tmp_path: Path, text: Any, remedy: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "label": 0}) + "\n")
    with path.open("a") as stream:
        stream.write(json.dumps({"text": text, "label": 1}) + "\n")
    with pytest.raises(DataError, match="line 2: column 'text' holds no text") as caught:
        load_splits(source="files", train=path, dev=path, text_columns=["text"])
    assert remedy in caught.value.remedy


def test_a_header_with_names_of_its_own_is_no_row(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tgold\none\t1\ntwo\t0\n")
    places = {"train": tmp_path / "train.tsv", "dev": tmp_path / "dev.tsv"}
    names = ["text", "label"]
    for kind in ("classification", "regression"):
        with pytest.raises(DataError, match=r"train\.tsv, line 1: this looks like a header"):
            load_splits(
                source="files", **places, column_names=names, text_columns=["text"], kind=kind
            )
    for path in places.values():
        path.write_text("one\tgold\ntwo\tsilver\n")
    splits = load_splits(source="files", **places, column_names=names, text_columns=["text"])
    assert splits.task.label_names == ("gold", "silver")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"Positive": 9, "positive": 9}, "'Positive' and 'positive'"),
        ({"very good": 9, "very  good": 9, "bad": 9}, "'very good' and 'very  good'"),
        ({"1": 9, "1.0": 9, "2": 9}, "'1' and '1.0'"),
        ({"0.5": 9, "1": 9}, "set data.kind=regression"),
        ({str(i): 4 for i in range(30)}, "30 classes for 120 training rows, 4.0 for each"),
        ({"a": 9, "b": 0}, "no training row is of the class 'b'"),
        ({"0": 9, "1": 9, "ham": 9, "spam": 9}, "numbers and others words: 0, 1 beside ham, spam"),
        ({"0": 9, "1": 9, "False": 9, "True": 9}, "0, 1 beside False, True"),
        ({"-1": 1, "0": 9, "1": 9}, "1 training rows are of the class '-1', which often stands"),
        ({"-": 2, "no": 9, "yes": 9}, "2 training rows are of the class '-'"),
    ],
)
def test_odd_classes_are_said(counts: dict[str, int], message: str) -> None:
    found = class_warnings(counts, dict.fromkeys(counts, 1))
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    "counts",
    [
        {"good": 1, "bad": 1},
        {"1": 9, "2": 9, "10": 9},
        {"0.0": 9, "1.0": 9},
        {"-1": 9, "0": 9, "1": 9},
        {"-1": 1, "1": 9},
        {"none": 9, "some": 9, "all": 9},
        {"18": 9, "young": 9, "old": 9},
        {str(i): 50 for i in range(77)},
        {},
    ],
)
def test_usual_classes_are_not(counts: dict[str, int]) -> None:
    assert class_warnings(counts, dict.fromkeys(counts, 1)) == []


def test_classes_that_the_dev_rows_lack_are_said() -> None:
    found = class_warnings({"a": 9, "b": 9, "c": 9}, {"a": 9, "b": 0, "c": 0})
    assert found == ["no dev row is of the classes 'b', 'c'"]
