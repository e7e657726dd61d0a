"""Training rows of one text, and dev rows of two: what embeddings are measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dist.data.sources import Splits, load_splits
from moe_dist.data.summary import measure_cut, measure_windows
from moe_dist.errors import DataError

TEXTS = [{"text": f"a text about number {number}"} for number in range(4)]
PAIRS = [
    {"question": "what is one", "passage": "one is a number", "score": 4.5},
    {"question": "what is two", "passage": "a text about number 2", "score": 1},
]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(folder: Path, pairs: Sequence[Mapping[str, Any]] = PAIRS, **changes: Any) -> Splits:
    arguments: dict[str, Any] = {
        "source": "files",
        "kind": "embedding",
        "train": write(folder / "train.jsonl", TEXTS),
        "dev": write(folder / "dev.jsonl", pairs),
        "text_columns": ["text"],
        "pair_columns": ["question", "passage"],
    }
    return load_splits(**(arguments | changes))


def test_pairs_without_scores_are_measured_by_what_they_find(tmp_path: Path) -> None:
    splits = load(tmp_path)
    first = {"text_a": TEXTS[0]["text"], "text_b": None, "label": 0, "sample_id": 0}
    assert splits.train[0] == first and len(splits.train) == 4
    pair = {"text_a": "what is one", "text_b": "one is a number", "label": 0, "sample_id": 0}
    assert splits.dev[0] == pair
    assert splits.task.metrics == ("recall_at_1", "recall_at_10", "mrr")
    assert "no labels" in splits.summary.figures


def test_pairs_with_scores_are_measured_by_correlation(tmp_path: Path) -> None:
    splits = load(tmp_path, label_column="score")
    assert splits.dev["label"][:] == [4.5, 1.0]
    assert splits.train["label"][:] == [0] * 4
    assert splits.task.metrics == ("cosine_spearman", "cosine_pearson")
    assert "labels from 1 to 4.5" in splits.summary.figures


def test_a_dev_row_of_which_one_text_is_trained_on_counts_as_seen(tmp_path: Path) -> None:
    assert load(tmp_path).summary.num_copies == 1
    pairs = [
        {"question": "where", "passage": "One is a number!"},
        {"question": "a", "passage": "b"},
    ]
    trained = write(tmp_path / "pairs.jsonl", pairs)
    splits = load(tmp_path, train=trained, text_columns=["question", "passage"])
    assert splits.summary.num_copies == 1


@pytest.mark.parametrize("metrics", [None, ["cosine_spearman"]])
def test_pairs_without_scores_where_they_are_asked_for(
    tmp_path: Path, metrics: list[str] | None
) -> None:
    pairs = [PAIRS[0], {name: PAIRS[1][name] for name in ("question", "passage")}]
    with pytest.raises(DataError, match=r"dev.jsonl, line 2: there is no column 'score'"):
        load(tmp_path, pairs, label_column="score", metrics=metrics)


def test_pairs_need_their_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no column 'passages'"):
        load(tmp_path, pair_columns=["question", "passages"])
    with pytest.raises(DataError, match=r"data.pair_columns does not name their two columns"):
        load(tmp_path, pair_columns=None)


def test_pairs_are_held_out_of_rows_that_have_all_columns(tmp_path: Path) -> None:
    words = "red green blue black white pink grey brown gold lime cyan teal".split()
    rows = [{"text": f"{word} " * 9, "title": f"about {word}"} for word in words]
    splits = load_splits(
        source="files",
        kind="embedding",
        train=write(tmp_path / "all.jsonl", rows),
        dev_size=3,
        text_columns=["text"],
        pair_columns=["title", "text"],
    )
    assert (len(splits.train), len(splits.dev)) == (9, 3)
    assert splits.train["text_b"][:] == [None] * 9
    for row in splits.dev:
        source = rows[row["sample_id"]]
        assert (row["text_a"], row["text_b"]) == (source["title"], source["text"])
    assert not set(splits.dev["text_b"][:]) & set(splits.train["text_a"][:])


def test_cut_rows_are_counted_once_however_many_of_their_texts_are_cut() -> None:
    import numpy as np

    from moe_dist.data.encoding import Encoded

    encoded = Encoded(
        input_ids=np.zeros(12, np.int32),
        token_type_ids=None,
        offsets=np.array([0, 4, 8, 12]),
        labels=np.zeros(3),
        sample_ids=np.array([7, 7, 8]),
        full_lengths=np.array([6, 9, 4]),
    )
    cut = measure_cut(encoded, 4)
    assert cut is not None and cut.num_cut == 1
    # Two texts of a row are no windows of one.
    assert measure_windows(encoded) is None
    assert measure_windows(replace(encoded, full_lengths=None)) is not None


def test_further_texts_need_one_of_two_columns(tmp_path: Path) -> None:
    trained = [{"question": f"what is number {n}", "passage": f"it is {n}"} for n in range(3)]
    texts = ["one more", "A text about number 2!", "what is one"]
    # A column that is not there, null or blank: as JSONL, Parquet and CSV have it.
    rows: list[dict[str, str | None]] = [
        {"passage": texts[0]},
        {"question": None, "passage": texts[1]},
        {"question": " ", "passage": texts[2]},
        {"question": "why", "passage": "because"},
    ]
    splits = load(
        tmp_path,
        train=write(tmp_path / "pairs.jsonl", trained),
        text_columns=["question", "passage"],
        unlabelled=[write(tmp_path / "more.jsonl", rows)],
    )
    assert splits.unlabelled is not None
    # Texts are read one by one, so that either text of a dev row may be repeated.
    sides = [splits.unlabelled[name][:] for name in ("text_a", "text_b")]
    assert sides == [["one more", "why"], [None, "because"]]
    assert splits.distilled["text_b"][:] == ["it is 0", "it is 1", "it is 2", None, "because"]
    assert splits.summary.unlabelled is not None
    assert splits.summary.unlabelled.left_out == {"that repeat dev rows": 2}
    with pytest.raises(DataError, match="there is no column 'question'; there are 'text'"):
        load(
            tmp_path,
            train=write(tmp_path / "pairs.jsonl", trained),
            text_columns=["question", "passage"],
            unlabelled=[write(tmp_path / "wrong.jsonl", TEXTS)],
        )


def test_further_texts_join_those_that_are_trained_on(tmp_path: Path) -> None:
    further = write(tmp_path / "more.jsonl", [{"text": "one more"}])
    splits = load(tmp_path, unlabelled=[further])
    assert splits.unlabelled is not None
    assert splits.unlabelled["text_a"][:] == ["one more"]
    assert splits.dev["text_b"][:] == [pair["passage"] for pair in PAIRS]
