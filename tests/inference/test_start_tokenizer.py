"""A start model has a tokenizer that fits it, or it is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.errors import ConversionError
from moe_dist.inference.pretrained import check_pretrained, load_pretrained
from moe_dist.inference.start_tokenizer import unknown_share
from moe_dist.tasks import TASK_KINDS
from tests.inference.start_models import (
    SPECIAL,
    edit_config,
    remove_tokenizer,
    write_start_model,
    write_tokenizer,
)

FAMILIES = ("bert", "gpt2", "t5", "bart")


def refused(directory: Path, kind: str | None = None) -> ConversionError:
    own: dict[str, Any] = {"num_labels": 2}
    own |= {"num_labels": 0, "kind": TASK_KINDS[kind]} if kind else {}
    with pytest.raises(ConversionError) as caught:
        check_pretrained(str(directory), **own)
    with pytest.raises(ConversionError):
        load_pretrained(str(directory), **own)
    return caught.value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [(), ("tokenizer_config.json",), ("special_tokens_map.json",)])
def test_no_vocabulary_is_made_up(tmp_path: Path, family: str, keep: tuple[str, ...]) -> None:
    directory = write_start_model(tmp_path / family, family)
    if "special_tokens_map.json" in keep:
        (directory / keep[0]).write_text("{}")
    remove_tokenizer(directory, keep=keep)
    error = refused(directory)
    assert "model.teacher" in error.message and "tokenizer" in error.message
    assert "save_pretrained" in error.remedy


@pytest.mark.parametrize("content", ["", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"])
def test_a_vocabulary_without_words_is_refused(tmp_path: Path, content: str) -> None:
    directory = write_start_model(tmp_path / "bert")
    remove_tokenizer(directory)
    (directory / "vocab.txt").write_text(content)
    assert "tokenizer" in refused(directory).message


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert")
    (directory / "tokenizer.json").write_text("{")
    assert "cannot be read" in refused(directory).message


def test_a_vocabulary_file_alone_is_enough(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert")
    remove_tokenizer(directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "good"]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    check_pretrained(str(directory), num_labels=2)


def test_the_end_token_pads_where_there_is_no_other(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "gpt2", "gpt2", pad_token_id=None)
    write_tokenizer(directory, "gpt2", without=("pad_token",))
    start = check_pretrained(str(directory), num_labels=2)
    assert start.warnings == ("the tokenizer has no pad token: '<end>' stands in",)
    model, tokenizer = load_pretrained(str(directory), num_labels=2)
    end = list(SPECIAL["gpt2"].values()).index("<end>")
    assert tokenizer.pad_token_id == model.config.pad_token_id == end
    # Padding changes no answer: the last real token is read.
    texts = ["the film was good", "bad plot"]
    with torch.no_grad():
        together = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = model(**tokenizer(texts[1:], return_tensors="pt")).logits
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize(
    ("family", "without"), [("gpt2", ("pad_token", "eos_token")), ("bert", ("pad_token",))]
)
def test_nothing_to_pad_with_is_refused(
    tmp_path: Path, family: str, without: tuple[str, ...]
) -> None:
    directory = write_start_model(tmp_path / family, family)
    write_tokenizer(directory, family, without=without)
    error = refused(directory)
    assert "no pad token" in error.message and "tokenizer.pad_token" in error.remedy


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_end_token_does_not_pad_where_the_answer_is_read(tmp_path: Path, family: str) -> None:
    directory = write_start_model(tmp_path / family, family)
    write_tokenizer(directory, family, without=("pad_token",))
    assert "reads its answer there" in refused(directory).message


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_model_that_writes_is_refused_for_what_it_writes(tmp_path: Path, family: str) -> None:
    directory = write_start_model(tmp_path / family, family, kind="ForConditionalGeneration")
    edit_config(directory, eos_token_id=7)
    error = refused(directory, "seq2seq")
    assert "its texts end with token 7" in error.message
    assert "reads its answer" not in error.message
    write_start_model(directory, family, kind="ForConditionalGeneration")
    write_tokenizer(directory, family, without=("pad_token",))
    error = refused(directory, "seq2seq")
    assert "no pad token, and '</s>' cannot stand in, since it ends the texts that" in error.message


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_answers_that_are_read_elsewhere_need_no_end(tmp_path: Path, family: str) -> None:
    directory = write_start_model(tmp_path / family, family, kind="ForQuestionAnswering")
    write_tokenizer(directory, family, without=("pad_token",))
    edit_config(directory, eos_token_id=7)
    own: dict[str, Any] = {"num_labels": 2, "kind": TASK_KINDS["question_answering"]}
    assert check_pretrained(str(directory), **own).warnings == (
        "the tokenizer has no pad token: '</s>' stands in",
    )


def test_model_and_tokenizer_pad_with_one_token(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "gpt2", "gpt2", pad_token_id=1)
    (line,) = check_pretrained(str(directory), num_labels=2).warnings
    assert (
        line == "config.json pads with token 1 and the tokenizer with 0 ('<pad>'), which is taken"
    )
    model, tokenizer = load_pretrained(str(directory), num_labels=2)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_without_embeddings_are_refused(tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    directory = write_start_model(tmp_path / family, family)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["superbly", "dreadful"])
    tokenizer.save_pretrained(directory)
    error = refused(directory)
    assert "2 tokens more ('superbly', 'dreadful')" in error.message
    assert "resize_token_embeddings" in error.remedy


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_texts_must_end_where_the_model_reads(tmp_path: Path, family: str) -> None:
    directory = write_start_model(tmp_path / family, family)
    edit_config(directory, eos_token_id=7)
    assert "end-of-sequence token 7" in refused(directory).message


def test_unknown_words_are_counted(tmp_path: Path) -> None:
    start = check_pretrained(str(write_start_model(tmp_path / "bert")), num_labels=2)
    assert unknown_share(start.tokenizer, ["good film", "zzz yyy"]) == 0.5
    assert unknown_share(start.tokenizer, ["good film"]) == 0.0
