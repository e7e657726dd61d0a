"""Recipes of language models: what is refused, in a line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config_recipes import faults, load, only_fault

RECIPE = """\
name: tiny
model:
  teacher: some/decoder
  max_length: 64
data:
  source: files
  kind: causal_lm
  train: train.txt
  dev: dev.txt
"""


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.text_columns=[a, b]", "reads one column of running text"),
        ("data.label_column=topic", "learns from the text alone"),
        ("data.stride=65", "not between 1 and model.max_length=64"),
        ("data.stride=0", "not between 1 and model.max_length=64"),
        ("distill.alignment_weight=1", "samples of data.kind=causal_lm are blocks"),
        ("distill.adversarial_weight=1", "samples of data.kind=causal_lm are blocks"),
        ("data.metrics=accuracy", "cannot measure data.kind=causal_lm"),
        ("data.label_names=[a, b]", "names classes"),
        ("data.pooling=mean", "belongs to data.kind=embedding"),
        ("data.documents=pages", "data.documents"),
    ],
)
def test_what_a_language_model_does_not_read_is_refused(
    tmp_path: Path, setting: str, words: str
) -> None:
    assert words in only_fault(tmp_path, setting, text=RECIPE)


def test_documents_are_those_of_text_files(tmp_path: Path) -> None:
    text = RECIPE.replace("source: files", "source: package").replace("train: train.txt", "")
    text = text.replace("dev: dev.txt", "name: bbc-news")
    assert "has one in each row; remove it" in only_fault(
        tmp_path, "data.documents=lines", text=text
    )


def test_it_shares_no_model_with_other_tasks(tmp_path: Path) -> None:
    tasks = (
        "data={source: tasks, tasks: {a: {source: files, kind: causal_lm, train: a, dev: b}, "
        "b: {source: files, train: a, dev: b, text_columns: x}}}"
    )
    assert any("predicts tokens" in fault for fault in faults(tmp_path, tasks))


def test_its_keys_belong_to_it(tmp_path: Path) -> None:
    assert "belongs to data.kind=causal_lm" in only_fault(tmp_path, "data.documents=lines")
    assert "causal_lm" in only_fault(tmp_path, "data.stride=16")


def test_a_stride_of_a_whole_window_is_one(tmp_path: Path) -> None:
    from moe_dist.config import load_config
    from tests.config_recipes import write

    config = load_config(write(tmp_path, RECIPE), ["data.stride=64", "distill.task_weight=0"])
    assert config.data.stride == 64
    assert load(tmp_path).data.stride is None
