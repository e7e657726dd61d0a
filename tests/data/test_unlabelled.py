"""Rows without labels: they join what a student is distilled on, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.data import unlabelled
from moe_dist.data.loaders import encode
from moe_dist.data.sources import Splits, load_splits
from moe_dist.errors import DataError
from moe_dist.inference.start_tokenizer import read_tokenizer
from moe_dist.tasks import TASK_KINDS
from tests.inference.start_models import write_tokenizer

WORDS = "the film was a good bad great awful fine dull plot acting music scene very slow".split()


def sentence(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=12))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(numbers: range) -> list[dict[str, Any]]:
    return [
        {"text": f"{number} {sentence(number)}", "label": "ab"[number % 2]} for number in numbers
    ]


def load(tmp_path: Path, further: list[dict[str, Any]] | None, **options: Any) -> Splits:
    arguments: dict[str, Any] = {
        "source": "files",
        "train": write(tmp_path / "train.jsonl", labelled(range(20))),
        "dev": write(tmp_path / "dev.jsonl", labelled(range(100, 106))),
        "text_columns": ["text"],
        "cache_dir": tmp_path / "cache",
    }
    if further is not None:
        arguments["unlabelled"] = [write(tmp_path / "further.jsonl", further)]
    return load_splits(**(arguments | options))


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": sentence(number)} for number in range(300, 300 + count)]


def test_they_join_the_rows_of_the_distillation_alone(tmp_path: Path) -> None:
    plain, splits = load(tmp_path, None), load(tmp_path, texts(5))
    assert splits.unlabelled is not None and len(splits.unlabelled) == 5
    assert splits.train["text_a"] == plain.train["text_a"] and len(splits.dev) == 6
    joined = splits.distilled
    assert joined["text_a"] == [*splits.train["text_a"], *splits.unlabelled["text_a"]]
    assert len(set(joined["sample_id"])) == 25, "each row has a number of its own"
    assert plain.unlabelled is None and plain.distilled["text_a"] == plain.train["text_a"]


def test_only_the_digest_of_the_distillation_covers_them(tmp_path: Path) -> None:
    plain, splits, more = (load(tmp_path, further) for further in (None, texts(5), texts(6)))
    assert plain.distill_digest == plain.train_digest
    for name in ("digest", "train_digest"):
        assert getattr(plain, name) == getattr(splits, name) == getattr(more, name)
    assert len({one.distill_digest for one in (plain, splits, more)}) == 3


def test_what_repeats_a_dev_row_is_left_out_and_said(tmp_path: Path) -> None:
    dev = [row["text"] for row in labelled(range(100, 106))]
    copies = [{"text": dev[0].upper()}, {"text": f"{dev[1]} !"}]
    splits = load(tmp_path, [*texts(5), *copies])
    assert splits.unlabelled is not None and len(splits.unlabelled) == 5
    assert splits.summary.unlabelled is not None
    assert splits.summary.unlabelled.left_out == {"that repeat dev rows": 2}
    assert "5 without labels to distil on (left out: 2 that repeat dev rows)" in (
        splits.summary.line
    )


def test_rows_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tmp_path, [*texts(3), {"text": labelled(range(100, 101))[0]["text"]}])

    def again(*args: object) -> object:
        raise AssertionError("every worker would compare them")

    monkeypatch.setattr(unlabelled, "find_repeats", again)
    second = load(tmp_path, [*texts(3), {"text": labelled(range(100, 101))[0]["text"]}])
    assert second.summary.unlabelled == first.summary.unlabelled
    with pytest.raises(AssertionError, match="every worker"):
        load(tmp_path, texts(4))


def test_what_repeats_a_row_that_is_withheld_is_left_out(tmp_path: Path) -> None:
    splits = load(tmp_path, None, holdout_samples=4)
    assert splits.holdout is not None
    further = [*texts(3), {"text": splits.holdout["text_a"][0]}]
    found = load(tmp_path, further, holdout_samples=4).summary.unlabelled
    assert found is not None and found.num_samples == 3
    assert found.left_out == {"that repeat those withheld": 1}


def test_a_label_column_may_be_there_and_is_not_read(tmp_path: Path) -> None:
    rows = [row | {"label": "no class"} for row in texts(3)]
    assert load(tmp_path, rows).distill_digest == load(tmp_path, texts(3)).distill_digest


@pytest.mark.parametrize("kind", ["classification", "regression", "seq2seq"])
def test_every_kind_takes_them(tmp_path: Path, kind: str) -> None:
    labels: list[Any] = ["a", "b"] if kind == "classification" else ["one", "two"]
    labels = [0.5, 1.5] if kind == "regression" else labels
    rows = [{"text": f"{n} {sentence(n)}", "label": label} for n, label in enumerate(labels * 9)]
    splits = load(
        tmp_path,
        texts(3),
        kind=kind,
        train=write(tmp_path / "own.jsonl", rows[:12]),
        dev=write(tmp_path / "own-dev.jsonl", rows[12:]),
    )
    assert len(splits.distilled) == 15


def test_a_target_is_read_where_there_is_one(tmp_path: Path) -> None:
    rows = [{"text": sentence(n), "label": f"title {n}"} for n in range(12)]
    further = [texts(1)[0], texts(2)[1] | {"label": "written"}]
    splits = load(
        tmp_path,
        further,
        kind="seq2seq",
        train=write(tmp_path / "own.jsonl", rows[:9]),
        dev=write(tmp_path / "own-dev.jsonl", rows[9:]),
    )
    assert splits.unlabelled is not None
    assert splits.unlabelled["label"] == ["", "written"]
    assert any("1 of 2 unlabelled rows have no target" in note for note in splits.summary.notes)


def test_running_text_joins_as_documents_that_fill_blocks(tmp_path: Path) -> None:
    def documents(name: str, numbers: list[int]) -> str:
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(f" = {n} = \n\n{sentence(n)}\n\n" for n in numbers))
        return str(path)

    splits = load(
        tmp_path,
        None,
        kind="causal_lm",
        text_columns=None,
        train=documents("own", [1, 2, 3]),
        dev=documents("dev", [100]),
        unlabelled=[documents("further", [300, 100, 301])],
    )
    further = splits.unlabelled
    assert further is not None and len(splits.distilled) == len(splits.train) + 2 == 5
    assert [text.split()[1] for text in further["text_a"]] == ["300", "301"]
    assert splits.summary.unlabelled is not None
    assert splits.summary.unlabelled.left_out == {"that repeat dev rows": 1}

    write_tokenizer(tmp_path / "gpt2", "gpt2")
    tokenizer = read_tokenizer(str(tmp_path / "gpt2"))
    num_tokens = {}
    for name in ("train", "distilled"):
        made = encode(
            getattr(splits, name),
            tokenizer,
            max_length=8,
            kind=TASK_KINDS["causal_lm"],
            is_training=True,
            cache_dir=tmp_path / "cache",
        )
        assert made.lengths.max() == 8
        num_tokens[name] = made.count_targets(np.arange(len(made)))
    # A heading of three tokens, a sentence of twelve, and the end; the first is not predicted.
    assert num_tokens == {"train": 3 * 15, "distilled": 5 * 15}


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such data file: data\.unlabelled=.*gone\.jsonl"):
        load(tmp_path, None, unlabelled=[str(tmp_path / "gone.jsonl")])
    with pytest.raises(DataError, match=r"further\.jsonl.*there is no column 'text'"):
        load(tmp_path, [{"words": "a film"}])
    dev = [{"text": row["text"]} for row in labelled(range(100, 106))]
    with pytest.raises(DataError, match="gives no rows but those that repeat dev rows"):
        load(tmp_path, dev)
