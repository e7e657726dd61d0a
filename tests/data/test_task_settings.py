"""What a recipe says of a task: the class that F1 is about, and metrics that fit the kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_dist.data.metrics import LabelSpace
from moe_dist.errors import DataError
from tests.data.tsv_rows import ROWS, Rows, load


def test_f1_is_of_the_second_class_unless_another_is_chosen(tmp_path: Path) -> None:
    splits = load(tmp_path, metrics=["f1", "accuracy"])
    assert splits.task.label_space == LabelSpace(2, 1, ("neg", "pos"))
    assert splits.metric_titles == {"f1": "f1 of pos", "accuracy": "accuracy"}
    chosen = load(tmp_path, metrics=["f1"], positive_label="neg")
    assert chosen.task.label_space.positive == 0
    assert chosen.metric_titles == {"f1": "f1 of neg"}
    # Naming the default changes nothing, so that what is there already stays.
    named = load(tmp_path, metrics=["f1", "accuracy"], positive_label="pos")
    assert named.digest == splits.digest
    assert load(tmp_path, metrics=["f1"]).digest != chosen.digest
    assert load(tmp_path, metrics=["f1"]).train_digest == chosen.train_digest


@pytest.mark.parametrize(
    ("rows", "changes", "message", "remedy"),
    [
        (ROWS, {"metrics": ["f1"], "positive_label": "Pos"}, "no class of these data", "neg, pos"),
        (
            [*ROWS, ("x", "so-so")],
            {"metrics": ["f1"], "positive_label": "pos"},
            "3 classes",
            "mean",
        ),
        (
            [("x", "0.5"), ("y", "1.5")],
            {"kind": "regression", "positive_label": "0.5"},
            "these data are regression",
            "remove it",
        ),
        (ROWS, {"positive_label": "pos"}, "is read by f1", "add f1"),
    ],
)
def test_a_positive_label_that_means_nothing_is_refused(
    tmp_path: Path, rows: Rows, changes: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, rows, **changes)
    assert remedy in str(caught.value.remedy)


def test_a_metric_of_another_kind_is_refused_where_the_recipe_names_no_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'perplexity'\] cannot measure data\.kind=cla"):
        load(tmp_path, metrics=["accuracy", "perplexity"])
