"""Pairs that teachers of embeddings are fine-tuned on, on one process and on several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizer

from moe_dist.data.encoding import encode
from moe_dist.data.loaders import Encoded, TrainBatches
from moe_dist.distributed import spawn_gloo
from moe_dist.errors import DataError
from moe_dist.losses.contrastive import in_batch_negatives
from moe_dist.tasks import TASK_KINDS
from moe_dist.tasks.tokens import pad, tokenise
from moe_dist.training.step import distill_terms, finetune_terms, freeze

KIND = TASK_KINDS["embedding"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] who wrote it a man what is that thing".split()
PAIRS = [
    ("who wrote it", "a man wrote it"),
    ("what is it", "that is a thing"),
    ("who", "a man wrote it"),
    ("what is that thing", "a thing"),
    ("is that it", "it is that thing"),
    ("what is it", "a man"),
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return BertTokenizer(vocab=str(tmp_path / "vocab.txt"))


def rows() -> dict[str, Any]:
    return {
        "text_a": [first for first, _ in PAIRS],
        "text_b": [second for _, second in PAIRS],
        "label": [0] * len(PAIRS),
        "sample_id": [10 * row for row in range(len(PAIRS))],
    }


def encoded_pairs(tokenizer: BertTokenizer, folder: Path) -> Encoded:
    return encode(
        Dataset.from_dict(rows()),
        tokenizer,
        max_length=16,
        kind=KIND.finetuning,
        cache_dir=folder,
        digest="finetuned",
    )


def tiny_encoder(**settings: Any) -> BertModel:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    config = BertConfig(hidden_size=8, intermediate_size=12, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    for key, value in KIND.model_settings(None, settings).items():
        setattr(config, key, value)
    return BertModel(config, add_pooling_layer=False)


def whole_batch(encoded: Encoded) -> dict[str, Tensor]:
    (step,) = TrainBatches(encoded, batch_size=len(encoded)).epoch(0)
    return step.micro_batches[0]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["a man", " ", "it", "a thing", "is it", "who"], "1 of 6 rows have an empty text"),
        (["a man"] * 6, "all 6 training pairs have the same second text"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(
    tokenizer: BertTokenizer, second: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        KIND.finetuning.tokens(
            rows() | {"text_b": second}, tokenizer, max_length=16, is_training=True
        )


def test_other_kinds_are_fine_tuned_as_they_are() -> None:
    for name, kind in TASK_KINDS.items():
        assert (kind.finetuning is kind) == (name != "embedding")
    assert KIND.finetuning.finetuning is KIND.finetuning


def test_a_pair_is_one_sample(tokenizer: BertTokenizer) -> None:
    kind = KIND.finetuning
    found = kind.tokens(rows(), tokenizer, max_length=5, is_training=True)
    assert found.targets is not None
    sides = (found.input_ids, found.targets)
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in side] for side in sides]
    assert list(zip(*texts, strict=True))[:2] == [
        ("who wrote it", "a man wrote"),
        (*PAIRS[1][:1], "that is a"),
    ]
    (a0, b0), (a1, b1), (a2, b2), *_, (a5, b5) = found.labels
    assert b0 == b2 and a1 == a5 and len({a0, a1, a2, b0, b1, b5}) == 6
    assert all(-(2**63) <= number < 2**63 for pair in found.labels for number in pair)


def test_a_step_counts_both_texts_of_its_pairs(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    encoded = encoded_pairs(tokenizer, tmp_path)
    made = KIND.finetuning.tokens(rows(), tokenizer, max_length=16, is_training=True)
    assert made.targets is not None
    lengths = [[*map(len, made.input_ids)], [*map(len, made.targets)]]
    (step,) = TrainBatches(encoded, batch_size=len(PAIRS)).epoch(0)
    assert step.num_tokens == sum(map(sum, lengths))
    longer = [max(sides[number // 10] for sides in lengths) for number in step.sample_ids]
    assert longer == sorted(longer) and lengths[0] != sorted(lengths[0])


def test_rows_of_one_text_are_no_pairs(tokenizer: BertTokenizer) -> None:
    single = rows() | {"text_b": [None] * len(PAIRS)}
    with pytest.raises(DataError, match="6 of 6 rows have an empty text or only one"):
        KIND.finetuning.tokens(single, tokenizer, max_length=8, is_training=True)


@pytest.mark.parametrize("settings", [{}, {"pooling": "max", "normalise": False}])
def test_the_loss_is_that_of_the_vectors_of_single_texts(
    tokenizer: BertTokenizer, tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    model = tiny_encoder(**settings).eval()
    batch = whole_batch(encoded_pairs(tokenizer, tmp_path))
    term = finetune_terms(model, batch).terms["task"]
    vectors = {}
    for text in {text for pair in PAIRS for text in pair}:
        inputs = pad(tokenizer, tokenise(tokenizer, [text], max_length=16))
        vectors[text] = KIND.answer(model, inputs, {})[0]
    first, second = (torch.stack([vectors[pair[side]] for pair in PAIRS]) for side in (0, 1))
    names = sorted(vectors)
    numbers = torch.tensor([[names.index(a), 50 + names.index(b)] for a, b in PAIRS])
    expected = in_batch_negatives(first, second, numbers)
    assert expected.min() > 0
    torch.testing.assert_close(term.sum, expected.sum(), rtol=1e-4, atol=1e-5)
    assert term.count_kind == "samples"


def test_students_and_scores_see_the_same_texts_one_by_one(
    tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    encoded = encode(
        Dataset.from_dict(rows()), tokenizer, max_length=16, kind=KIND, cache_dir=tmp_path
    )
    assert len(encoded) == 2 * len(PAIRS) and encoded.targets is None
    student = tiny_encoder()
    found = distill_terms(student, freeze(tiny_encoder()), whole_batch(encoded), with_task=False)
    assert "task" not in found.terms


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_several_processes_tell_a_text_from_those_of_all(
    tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    encoded = encoded_pairs(tokenizer, tmp_path).subset(range(5))
    alone = step_of(encoded, 0, 1)
    spawn_gloo(write_step, 2, encoded, tmp_path)
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [part["num_pairs"] for part in parts] == [3, 2]
    assert sum(part["loss"] for part in parts) == pytest.approx(alone["loss"], rel=1e-5)
    together = torch.tensor([part["gradient"] for part in parts]).sum(dim=0)
    expected = torch.tensor(alone["gradient"])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-5)


def write_step(rank: int, world: int, encoded: Encoded, out: Path) -> None:
    (out / f"{rank}.json").write_text(json.dumps(step_of(encoded, rank, world)))


def step_of(encoded: Encoded, rank: int, world: int) -> dict[str, Any]:
    """One rank's share of a step: its part of the loss, and its gradient."""
    model = tiny_encoder().train()
    (step,) = TrainBatches(encoded, batch_size=len(encoded), world_size=world, rank=rank).epoch(0)
    term = finetune_terms(model, step.micro_batches[0]).terms["task"]
    term.sum.backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return {
        "num_pairs": len(step.sample_ids),
        "loss": term.sum.item(),
        "gradient": torch.cat([gradient.flatten() for gradient in gradients]).tolist(),
    }
