"""Models from nothing: whole directories, the same ones again, tokenizers that know the texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.data.sources import load_splits
from moe_dist.errors import ConversionError
from moe_dist.inference.pretrained import check_pretrained, load_pretrained
from moe_dist.inference.scratch import SCRATCH_MODELS, scratch_line, scratch_model
from moe_dist.inference.start_tokenizer import read_tokenizer, unknown_share
from tests.pipelines.conftest import write_sentences


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("rows")
    write_sentences(place / "train.jsonl", count=32)
    return load_splits(
        source="files", train=place / "train.jsonl", dev_size=8, text_columns=["text"]
    )


@pytest.mark.parametrize("name", SCRATCH_MODELS)
def test_a_model_is_made_whole_with_a_tokenizer_for_any_text(
    name: str, rows: Any, tmp_path: Path
) -> None:
    folder = scratch_model(name, rows, seed=0, cache_dir=tmp_path)
    start = check_pretrained(str(folder), num_labels=2, label_names=["a", "b"])
    assert all(line.startswith(("new: ", "not used: ")) for line in start.notes)
    assert start.warnings == ()
    tokenizer = read_tokenizer(str(folder))
    text = "the film was good ☃ <pad>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip()
    assert unknown_share(tokenizer, [text]) == 0
    assert len(tokenizer(" film acting", add_special_tokens=False)["input_ids"]) == 2
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_seeds_and_texts_decide_the_weights(rows: Any, tmp_path: Path) -> None:
    first = scratch_model("tiny-gpt2", rows, seed=0, cache_dir=tmp_path)
    again = scratch_model("tiny-gpt2", rows, seed=0, cache_dir=tmp_path / "other")
    other = scratch_model("tiny-gpt2", rows, seed=1, cache_dir=tmp_path)
    assert first.name == again.name != other.name
    weights = [(one / "model.safetensors").read_bytes() for one in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (first / "tokenizer.json").read_text() == (again / "tokenizer.json").read_text()


def test_the_generator_of_the_caller_is_left_alone(rows: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scratch_model("tiny-gpt2", rows, seed=5, cache_dir=tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_it_is_a_start_for_a_task(rows: Any, tmp_path: Path) -> None:
    folder = scratch_model("tiny-bart", rows, seed=0, cache_dir=tmp_path)
    model, tokenizer = load_pretrained(str(folder), num_labels=2, label_names=["a", "b"])
    ids = tokenizer(["the film"], return_tensors="pt")
    assert model.eval()(**ids).logits.shape == (1, 2)


def test_others_are_refused_and_random_weights_are_said(rows: Any) -> None:
    with pytest.raises(ConversionError, match="scratch:gpt5 is no model") as caught:
        scratch_model("gpt5", rows, seed=0)
    assert "scratch:tiny-gpt2" in str(caught.value)
    assert "random weights" in (scratch_line("scratch:tiny-gpt2") or "")
    assert scratch_line("gpt2") is None
