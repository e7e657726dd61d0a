"""Recipes of sentence embeddings: what they may say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config_recipes import load, only_fault

PAIRS = (
    "data.kind=embedding",
    "data.text_columns=[text]",
    "data.pair_columns=[question, passage]",
    "finetune.num_epochs=0",
    "distill.task_weight=0",
)


def test_a_recipe_of_embeddings_is_read(tmp_path: Path) -> None:
    data = load(tmp_path, *PAIRS, "data.pooling=cls", "data.normalise=false").data
    assert data.pair_columns == ("question", "passage")
    assert (data.pooling, data.normalise) == ("cls", False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.metrics=[accuracy]", "cannot measure data.kind=embedding; use "),
        ("data.label_names=[bad, good]", "has none; remove label_names"),
        ("data.metrics=[cosine_spearman]", "data.label_column names no column of scores"),
        ("finetune.num_epochs=2", "data.text_columns=['text'] does not name the two columns"),
        ("distill.task_weight=1", "distill.task_weight=1 is that of a loss on labels"),
        ("distill.adversarial_weight=1", "data.kind=embedding has vectors; set it to 0"),
        ("data.holdout_samples=9", "have no pairs to measure on; set it to 0"),
        ("student.hidden_size=128", "student.hidden_size=128 changes the width of vectors"),
        ("data.pair_columns=[question, question]", "holds a name twice"),
        ("data.pair_columns=[question]", "data.pair_columns"),
    ],
)
def test_what_embeddings_cannot_be_is_one_fault(tmp_path: Path, change: str, words: str) -> None:
    assert words in only_fault(tmp_path, *PAIRS, change)


def test_a_teacher_is_fine_tuned_on_pairs(tmp_path: Path) -> None:
    tuned = ("data.text_columns=[question, passage]", "finetune.num_epochs=2")
    assert load(tmp_path, *PAIRS, *tuned).teacher_train.num_epochs == 2
    inherited = [line for line in (*PAIRS, tuned[0]) if line != "finetune.num_epochs=0"]
    assert load(tmp_path, *inherited).teacher_train.num_epochs > 0
    scored = "data.label_column=score"
    assert "have scores in data.label_column=score" in only_fault(tmp_path, *PAIRS, *tuned, scored)
    other = "data.text_columns=[anchor, positive]"
    assert load(tmp_path, *PAIRS, *tuned, other, scored).teacher_train.num_epochs == 2
    assert load(tmp_path, *PAIRS, tuned[0], scored).teacher_train.num_epochs == 0


def test_a_pair_is_never_alone_in_its_micro_batch(tmp_path: Path) -> None:
    tuned = (*PAIRS, "data.text_columns=[question, passage]", "finetune.num_epochs=1")
    small = ("finetune.batch_size=7", "finetune.accumulation=4")
    assert "use batch_size 8 or more" in only_fault(tmp_path, *tuned, *small)
    assert load(tmp_path, *tuned, *small, "finetune.batch_size=8").finetune.batch_size == 8


def test_scores_and_passages_are_not_measured_on_the_same_pairs(tmp_path: Path) -> None:
    both = ("data.label_column=score", "data.metrics=[cosine_spearman, mrr]")
    assert "finds passages" in only_fault(tmp_path, *PAIRS, *both)


def test_keys_of_embeddings_are_refused_elsewhere(tmp_path: Path) -> None:
    found = only_fault(tmp_path, "data.pooling=mean")
    assert found == "data.pooling belongs to data.kind=embedding, not classification; remove it."


def test_several_tasks_share_no_vectors(tmp_path: Path) -> None:
    text = """\
name: two
model: {teacher: some/encoder}
data:
  source: tasks
  tasks:
    one: {source: hub, name: nyu-mll/glue, subset: rte}
    two: {source: hub, name: a/b, kind: embedding, pair_columns: [q, p], dev: dev}
"""
    found = only_fault(tmp_path, text=text)
    assert found.startswith("data.tasks.two.kind=embedding has no head of its own")
