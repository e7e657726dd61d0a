from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.data.loaders import Encoded
from moe_dist.data.sources import Splits, load_splits
from moe_dist.data.summary import Cut, measure_cut
from moe_dist.errors import DataError


def load(folder: Path, train: list[tuple[str, Any]], dev: Any = None, **changes: Any) -> Splits:
    arguments: dict[str, Any] = {"source": "files", "text_columns": ["text"]}
    for name, rows in (("train", train), ("dev", dev)):
        if rows is not None:
            path = folder / f"{name}.tsv"
            lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
            path.write_text("\n".join(lines) + "\n")
            arguments[name] = path
    return load_splits(**(arguments | changes))


TRAIN = [(f"a film of kind {word}", "good") for word in ("one", "two", "three")]
TRAIN += [("a dull plot", "bad")]


def test_rows_and_classes_in_one_line(tmp_path: Path) -> None:
    summary = load(tmp_path, TRAIN, [("fine", "good"), ("poor", "bad")]).summary
    assert summary.train.class_counts == {"bad": 1, "good": 3}
    assert summary.figures == (
        "4 to train, 2 for dev; 2 classes: bad 25.0%, good 75.0%; no dev rows are training rows too"
    )
    assert summary.line == f"files {tmp_path}/train.tsv and {tmp_path}/dev.tsv; {summary.figures}"
    assert summary.warnings == ()


def test_many_classes_are_counted(tmp_path: Path) -> None:
    rows = [(f"text {i} {j}", f"class {i}") for i in range(12) for j in range(i + 1)]
    summary = load(tmp_path, rows, rows).summary
    assert "12 classes: class 11 15.4%, class 10 14.1%" in summary.figures
    assert "5 more, the rarest with 1 rows" in summary.figures


@pytest.mark.parametrize(
    ("texts", "copies"), [(("A Film, of kind ONE!", "new"), 1), (("👍", "👎"), 1)]
)
def test_dev_rows_that_are_training_rows_are_counted(
    tmp_path: Path, texts: tuple[str, str], copies: int
) -> None:
    summary = load(tmp_path, [*TRAIN, ("👍", "good")], [(t, "good") for t in texts]).summary
    assert summary.num_copies == copies
    assert any("1 of 2 dev rows are training rows too" in line for line in summary.warnings)


def test_pairs_are_copies_only_whole(tmp_path: Path) -> None:
    for name, rows in (("train", "a\tb\t0\nb\tc\t1\n"), ("dev", "a\tc\t0\nb\tC.\t1\n")):
        (tmp_path / f"{name}.tsv").write_text(f"x\ty\tlabel\n{rows}")
    places = {"train": tmp_path / "train.tsv", "dev": tmp_path / "dev.tsv"}
    summary = load_splits(source="files", **places, text_columns=["x", "y"]).summary
    assert summary.num_copies == 1


def test_rows_that_are_left_out_are_counted_by_the_reason(tmp_path: Path) -> None:
    rows = [(f"sentence number {i} about subject {i * 7} only", str(i % 2)) for i in range(50)]
    rows.append((rows[0][0] + " indeed", "0"))
    splits = load(tmp_path, rows, dev_size=40, max_train_samples=5, max_dev_samples=10)
    assert splits.summary.num_copies == 0
    assert splits.summary.dev.left_out == {"not drawn": 30}
    left_out = splits.summary.train.left_out
    assert left_out["not drawn"] + left_out.get("near copies", 0) == 51 - 40 - 5
    assert "5 to train (left out: " in splits.summary.figures


def test_a_hub_row_without_label_or_text_is_left_out_and_counted(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {
        "train": {"text": ["a", "b", None, "d", "e"], "label": [0, -1, 1, 1, None]},
        "validation": {"text": ["x", "y"], "label": [-1, 1]},
        "test": {"text": ["x", "y"], "label": [-1, -1]},
    }
    for split, columns in rows.items():
        Dataset.from_dict(columns, features=features).to_parquet(
            tmp_path / f"{split}-00000-of-00001.parquet"
        )
    splits = load_splits(source="hub", name=str(tmp_path), text_columns=["text"])
    assert splits.summary.train.left_out == {"without a label": 2, "without a text": 1}
    assert splits.summary.dev.left_out == {"without a label": 1}
    assert splits.train["text_a"][:] == ["a", "d"]
    # Where a row stood in its source stays what it was.
    assert splits.train["sample_id"][:] == [0, 3]
    with pytest.raises(DataError, match="no row of a split has a label"):
        load_splits(source="hub", name=str(tmp_path), text_columns=["text"], dev="test")


def test_minus_one_is_a_class_of_the_hub_where_no_names_are_declared(tmp_path: Path) -> None:
    from datasets import Dataset

    for split in ("train", "validation"):
        rows = {"text": ["a", "b", "c"], "label": [-1, 0, 1]}
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    splits = load_splits(source="hub", name=str(tmp_path), text_columns=["text"])
    assert splits.task.label_names == ("-1", "0", "1")
    assert splits.summary.train.left_out == {}


def test_an_unlabelled_row_of_a_file_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.tsv, line 6: label '-1' is not in the list"):
        load(tmp_path, [*TRAIN, ("x", "-1")], TRAIN, label_names=["good", "bad"])


def test_values_of_a_regression(tmp_path: Path) -> None:
    rows = [("a", 0.5), ("b", 2.5)]
    summary = load(tmp_path, rows, [("c", 1)], kind="regression").summary
    assert "labels from 0.5 to 2.5, mean 1.5" in summary.figures
    assert summary.train.class_counts == {}
    constant = load(tmp_path, [("a", 1), ("b", 1.0)], [("c", 1)], kind="regression").summary
    assert constant.warnings == ("all training labels are 1: there is nothing to learn",)


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    summary = load(
        tmp_path, [*TRAIN, ("", "bad"), (" ", "bad")], [("x", "good"), ("y", "bad")]
    ).summary
    assert summary.warnings == ("2 training rows have no text",)


def test_blanks_around_labels_are_said(tmp_path: Path) -> None:
    summary = load(tmp_path, [*TRAIN, ("x", "good "), ("y", " bad")], TRAIN[2:]).summary
    assert summary.notes == ("2 labels have blanks around them, which were dropped",)
    assert list(summary.train.class_counts) == ["bad", "good"]


def encoded(lengths: list[int], full_lengths: list[int]) -> Encoded:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Encoded(
        input_ids=np.zeros(offsets[-1], np.int32),
        token_type_ids=None,
        offsets=offsets,
        labels=np.zeros(len(lengths), np.int64),
        sample_ids=np.arange(len(lengths)),
        full_lengths=np.array(full_lengths),
    )


def test_cut_rows_are_counted_and_warned_of(tmp_path: Path) -> None:
    summary = load(tmp_path, TRAIN, [("fine", "good"), ("poor", "bad")]).summary
    train = measure_cut(encoded([3, 8, 8, 8], [3, 8, 10, 18]), 8)
    dev = measure_cut(encoded([2, 8], [2, 8]), 8)
    assert (train.num_cut, train.mean_lost, train.longest) == (2, 6.0, 18)
    found = summary.with_cuts(train, dev)
    assert found.warnings == (
        "model.max_length=8 cuts 2 of 4 training rows and 0 of 2 dev rows, by 6 tokens on average; "
        "the longest row has 18 tokens",
    )
    assert "2 rows cut at 8 tokens" in found.figures
    whole = summary.with_cuts(dev, dev)
    assert whole.warnings == () and "no rows cut at 8 tokens" in whole.figures


@pytest.mark.parametrize(
    ("limit", "longest", "is_warned"), [(600, 50, True), (600, 61, False), (500, 1, False)]
)
def test_a_limit_far_above_all_targets_is_warned_of(
    tmp_path: Path, limit: int, longest: int, is_warned: bool
) -> None:
    summary = load(tmp_path, TRAIN, [("fine", "good"), ("poor", "bad")]).summary
    train = Cut(num_cut=0, max_length=limit, mean_lost=0.0, longest=longest)
    found = summary.with_target_cuts(train, replace(train, longest=1))
    expected = (
        "data.max_target_length=600 is far more than the 50 tokens of the longest target: what a "
        "model does not end is written so long, by each beam; about 100 are enough",
    )
    assert found.warnings == (expected if is_warned else ())


def test_the_record_holds_no_texts_and_no_places(tmp_path: Path) -> None:
    record = load(tmp_path, TRAIN, TRAIN).summary.as_record()
    assert record["num_copies"] == 4 and record["train"]["class_counts"] == {"bad": 1, "good": 3}
    assert str(tmp_path) not in str(record) and "dull plot" not in str(record)
