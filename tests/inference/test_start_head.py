"""A trained head answers in the task's order of classes, whatever its own order is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dist.inference.pretrained import check_pretrained, load_pretrained
from moe_dist.inference.start_head import match_head
from tests.inference.start_models import edit_config, edit_weights, write_start_model

WANTED = ["negative", "positive"]


@pytest.mark.parametrize(
    ("own", "rows"),
    [
        (["positive", "negative"], (1, 0)),
        (["POSITIVE", "NEGATIVE"], (1, 0)),
        (["NEGATIVE", "POSITIVE"], (0, 1)),
        (["LABEL_0", "LABEL_1"], (0, 1)),
        (["0", "1"], (0, 1)),
        (["bad", "good"], (0, 1)),
        (["positive", "mixed"], None),
    ],
)
def test_rows_go_by_name(own: list[str], rows: tuple[int, ...] | None) -> None:
    assert match_head(own, WANTED).rows == rows


def test_three_classes_are_put_in_order() -> None:
    use = match_head(
        ["Not-Entailed", "unknown", "entailed"], ["entailed", "not_entailed", "unknown"]
    )
    assert use.rows == (2, 0, 1)
    assert "put in order" in use.line and not use.is_guess


def test_other_names_are_matched_by_place_with_a_warning() -> None:
    use = match_head(["bad", "good"], WANTED)
    assert use.is_guess
    assert use.line.endswith("output 0 (bad) as negative, output 1 (good) as positive")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_a_head_in_another_order_gives_the_same_answers(tmp_path: Path, family: str) -> None:
    names = dict(enumerate(WANTED))
    directory = write_start_model(tmp_path / family, family, id2label=names)
    texts = ["the film was good", "a poor plot to me and a dull cast"]

    def answers() -> torch.Tensor:
        model, tokenizer = load_pretrained(str(directory), num_labels=2, label_names=WANTED)
        with torch.no_grad():
            found: torch.Tensor = model.eval()(
                **tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
            ).logits
        return found

    before = answers()
    last = {"bert": "classifier.", "gpt2": "score."}.get(family, "classification_head.out_proj.")
    edit_weights(
        directory,
        lambda weights: {
            name: one.flip(0) if name.startswith(last) else one for name, one in weights.items()
        },
    )
    torch.testing.assert_close(answers(), before.flip(1))
    edit_config(
        directory,
        id2label={"0": "Positive", "1": "Negative"},
        label2id={"Positive": 0, "Negative": 1},
    )
    torch.testing.assert_close(answers(), before)
    notes = check_pretrained(str(directory), num_labels=2, label_names=WANTED).notes
    assert notes == (
        "its head has the classes as Positive, Negative: put in order as negative, positive",
    )


def test_names_that_stand_in_label2id_alone_count(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert")
    edit_config(directory, id2label=None, label2id={"positive": 0, "negative": 1})
    notes = check_pretrained(str(directory), num_labels=2, label_names=WANTED).notes
    assert "put in order as negative, positive" in notes[0]


def test_names_that_contradict_each_other_are_said(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert", id2label={0: "positive", 1: "negative"})
    edit_config(directory, label2id={"negative": 0, "positive": 1})
    start = check_pretrained(str(directory), num_labels=2, label_names=WANTED)
    assert "put in order" in start.notes[0]
    assert "contradict" in start.warnings[0]


def test_a_head_that_contradicts_is_drawn_anew(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert", id2label={0: "positive", 1: "mixed"})
    edit_weights(directory, lambda weights: weights | {"classifier.bias": torch.full((2,), 7.0)})
    model, _ = load_pretrained(str(directory), num_labels=2, label_names=WANTED)
    assert not model.classifier.bias.any()
    notes = check_pretrained(str(directory), num_labels=2, label_names=WANTED).notes
    assert "a new head is drawn" in notes[0]


def test_heads_of_several_tasks_are_forgotten_with_another_task(tmp_path: Path) -> None:
    heads = [{"name": "a", "label_names": None}, {"name": "b", "label_names": None}]
    directory = write_start_model(
        tmp_path / "bert", task_heads=heads, id2label={0: "a/value", 1: "b/value"}
    )
    model, _ = load_pretrained(str(directory), num_labels=2, label_names=WANTED)
    assert not hasattr(model.config, "task_heads")
