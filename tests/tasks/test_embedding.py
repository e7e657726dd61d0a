"""Sentence embeddings: samples, vectors, losses and figures, against loops over single texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, BertTokenizer, GPT2Config

from moe_dist.conversion import score_importance
from moe_dist.data import encoding
from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.data.metrics import METRICS
from moe_dist.errors import DataError, MissingInputError
from moe_dist.inference.sentence_directory import SentencePooling
from moe_dist.losses.alignment import POOLINGS
from moe_dist.tasks import TASK_KINDS, Answered, model_kind
from moe_dist.tasks.embedding import MAX_LENGTH, NORMALISED, POOLING

KIND = TASK_KINDS["embedding"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] who wrote it a man what is that thing".split()
PAIRS = [
    ("who wrote it", "a man wrote it"),
    ("what is it", "that is a thing"),
    ("who is that", "a man wrote it"),
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return BertTokenizer(vocab=str(tmp_path / "vocab.txt"))


def rows(pairs: Sequence[tuple[str, str | None]], labels: Sequence[float]) -> dict[str, Any]:
    return {
        "text_a": [first for first, _ in pairs],
        "text_b": [second for _, second in pairs],
        "label": list(labels),
        "sample_id": [10 * row for row in range(len(pairs))],
    }


def test_training_takes_every_text_of_a_row(tokenizer: BertTokenizer) -> None:
    pairs = [("who wrote it", "a man"), ("who wrote it", None)]
    found = KIND.tokens(rows(pairs, [0, 0]), tokenizer, max_length=8, is_training=True)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.input_ids]
    assert texts == ["who wrote it", "a man", "who wrote it"]
    assert list(found.rows) == [0, 0, 1]
    assert list(found.labels) == [0, 0, 0]


def test_measuring_takes_each_text_once_and_says_whose_it_is(tokenizer: BertTokenizer) -> None:
    found = KIND.tokens(
        rows([*PAIRS, PAIRS[0]], [1.0, 2.0, 3.0, 4.0]), tokenizer, max_length=4, is_training=False
    )
    assert list(found.rows) == [0, 0, 1, 1, 2]
    assert [tuple(label) for label in found.labels] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert found.full_lengths == [5, 6, 5, 6, 5]
    assert max(map(len, found.input_ids)) == 4


def test_a_text_is_measured_once_however_far_apart_its_rows_are(
    tokenizer: BertTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_CHUNK_ROWS", 1)
    dataset = Dataset.from_dict(rows(PAIRS, [0, 0, 0]))
    for is_training, expected in ((False, 5), (True, 6)):
        found = encoding.encode(
            dataset,
            tokenizer,
            max_length=8,
            kind=KIND,
            is_training=is_training,
            cache_dir=tmp_path,
        )
        assert len(found) == expected


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_are_those_of_real_tokens_alone(pooling: str, normalise: bool, side: str) -> None:
    config = SimpleNamespace(**{POOLING: pooling, NORMALISED: normalise})
    model = SimpleNamespace(config=config)
    torch.manual_seed(0)
    lengths, width = [3, 5, 1], 5
    hidden, mask = torch.randn(3, width, 4), torch.zeros(3, width).long()
    expected = []
    for row, length in enumerate(lengths):
        part = slice(0, length) if side == "right" else slice(width - length, width)
        mask[row, part] = 1
        states = hidden[row, part]
        vector = {"mean": states.mean(0), "max": states.amax(0), "cls": states[0]}[pooling]
        expected.append(vector / vector.norm() if normalise else vector)
    hidden[mask == 0] = math.nan
    found = KIND.predictions(
        model,  # type: ignore[arg-type]
        SimpleNamespace(last_hidden_state=hidden),
        {"attention_mask": mask},
    )
    torch.testing.assert_close(found, torch.stack(expected))


def test_the_loss_is_a_cosine_and_a_squared_distance() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 8), torch.randn(5, 8)
    errors = KIND.prediction_errors(student, teacher, {})
    total = 0.0
    for own, other, error in zip(student, teacher, errors, strict=True):
        cosine = float(own @ other / own.norm() / other.norm())
        assert float(error) == pytest.approx(1 - cosine, abs=1e-6)
        total += 1 - cosine + float((own - other) @ (own - other) / (other @ other)) / 2
    assert float(KIND.prediction_loss(student, teacher, {})) == pytest.approx(total, rel=1e-5)
    assert float(KIND.soft_target_loss(student, teacher, {})) == pytest.approx(total, rel=1e-5)


def test_both_parts_of_the_loss_are_equal_for_vectors_of_length_1() -> None:
    student, teacher = (torch.nn.functional.normalize(torch.randn(6, 8)) for _ in range(2))
    errors = KIND.prediction_errors(student, teacher, {})
    torch.testing.assert_close(KIND.prediction_loss(student, teacher, {}), 2 * errors.sum())


def test_the_length_counts_where_vectors_have_any() -> None:
    teacher = torch.randn(4, 8)
    assert float(KIND.prediction_loss(teacher, teacher, {})) == pytest.approx(0, abs=1e-5)
    doubled = KIND.prediction_loss(2 * teacher, teacher, {})
    assert float(doubled) == pytest.approx(4 * 0.5, rel=1e-5)


def test_neurons_are_scored_on_a_direction_that_belongs_to_the_sample() -> None:
    vectors = torch.eye(6).repeat(4, 1)
    numbers = torch.tensor([5] * 6 + [9] * 6 + [5] * 6 + [10**9] * 6)
    found = KIND.scored_losses(vectors, {"sample_ids": numbers}).reshape(4, 6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(found[0], found[2])
    assert abs(float(found[0] @ found[1])) < 0.99
    one = KIND.scored_losses(vectors[7:8], {"sample_ids": numbers[7:8]})
    torch.testing.assert_close(one[0], found[1, 1])


def test_texts_have_no_loss_of_their_own() -> None:
    with pytest.raises(MissingInputError, match="no loss of their own"):
        KIND.losses(torch.zeros(1, 2), {"labels": torch.zeros(1)})


def answered(
    tokenizer: BertTokenizer, pairs: Sequence[tuple[str, str]], vectors: Mapping[str, Any]
) -> Answered:
    columns = rows(pairs, [float(row) for row in range(len(pairs))])
    tokens = KIND.tokens(columns, tokenizer, max_length=16, is_training=False)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens.input_ids]
    return Answered(
        raw=np.array([vectors[text] for text in texts], np.float32),
        sample_ids=np.array([columns["sample_id"][row] for row in tokens.rows]),
        labels=np.array(tokens.labels, np.float32),
        rows=columns,
        columns={},
        offsets=np.zeros(1, np.int64),
        tokenizer=tokenizer,
        options={},
    )


def test_figures_are_cosines_and_ranks_among_distinct_passages(tokenizer: BertTokenizer) -> None:
    vectors = {
        "who wrote it": [1.0, 0.1],
        "what is it": [1.0, 0.2],
        "who is that": [0.1, 1.0],
        "a man wrote it": [2.0, 0.0],
        "that is a thing": [0.0, 3.0],
    }
    found = KIND.figures(answered(tokenizer, PAIRS, vectors))
    assert KIND.columns == ("cosine", "rank")
    for (question, passage), (cosine, rank) in zip(PAIRS, found.values, strict=True):
        own, other = np.array(vectors[question]), np.array(vectors[passage])
        assert cosine == pytest.approx(
            own @ other / np.linalg.norm(own) / np.linalg.norm(other), rel=1e-6
        )
        assert rank in (1, 2)
    assert found.values[:, 1].tolist() == [1, 2, 2]
    assert found.labels.tolist() == [0, 1, 2]
    assert found.sample_ids.tolist() == [0, 10, 20]


def test_equal_vectors_for_all_texts_find_nothing(tokenizer: BertTokenizer) -> None:
    texts = {text: [0.5, 0.5] for pair in PAIRS for text in pair}
    assert KIND.figures(answered(tokenizer, PAIRS, texts)).values[:, 1].tolist() == [2, 2, 2]


def test_figures_do_not_depend_on_the_order_of_samples(tokenizer: BertTokenizer) -> None:
    torch.manual_seed(0)
    texts = {text: torch.randn(4).tolist() for pair in PAIRS for text in pair}
    whole = answered(tokenizer, PAIRS, texts)
    again = answered(tokenizer, PAIRS[::-1], texts)
    first, second = KIND.figures(whole), KIND.figures(again)
    assert np.array_equal(first.values, second.values[::-1])


def test_dev_rows_need_pairs_and_are_measured_by_what_they_have() -> None:
    with pytest.raises(DataError, match="pair_columns"):
        KIND.dev_rows({}, has_labels=False)
    options = {"pair_columns": ("question", "passage")}
    found, scored = (KIND.dev_rows(options, has_labels=flag) for flag in (False, True))
    assert found is not None and scored is not None
    assert (found.label, scored.label) == ("none", "number")
    assert not any(METRICS[metric].reads_labels for metric in found.metrics)
    assert all(METRICS[metric].reads_labels for metric in scored.metrics)


def test_sentence_transformers_files_are_written_of_the_same_entries() -> None:
    config = SimpleNamespace(**{POOLING: "cls", NORMALISED: False, MAX_LENGTH: 77})
    assert SentencePooling.of(config) == SentencePooling("cls", False, 77)
    settings = KIND.model_settings(None, {"max_seq_length": 9})
    assert SentencePooling.of(SimpleNamespace(**settings)) == SentencePooling("mean", True, 9)


def test_a_model_is_known_by_its_configuration() -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    config = BertConfig(hidden_size=8, intermediate_size=8, **sizes)
    assert not KIND.owns("BertModel", config)
    for key, value in KIND.model_settings(None, {"pooling": "max", "normalise": False}).items():
        setattr(config, key, value)
    assert model_kind(BertModel(config, add_pooling_layer=False)) is KIND
    assert getattr(config, POOLING) == "max" and getattr(config, NORMALISED) is False
    assert not KIND.owns("BertForSequenceClassification", config)
    decoder = GPT2Config(**{POOLING: "mean"})
    assert KIND.owns("GPT2Model", decoder) and not KIND.owns("GPT2LMHeadModel", decoder)
    assert KIND.model_arguments(["self", "config", "add_pooling_layer"])
    assert not KIND.model_arguments(["self", "config"])


def test_neurons_score_the_same_at_every_batch_size_and_on_every_rank() -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
    config = BertConfig(hidden_size=8, intermediate_size=12, **sizes)
    for key, value in KIND.model_settings(None).items():
        setattr(config, key, value)
    model = BertModel(config, add_pooling_layer=False).eval()
    lengths = np.array([3, 7, 5, 6, 4])
    encoded = Encoded(
        input_ids=np.arange(lengths.sum(), dtype=np.int32) % 30,
        token_type_ids=None,
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        labels=np.zeros(5, np.int64),
        sample_ids=np.array([40, 3, 17, 8, 25]),
    )
    expected = score_importance(model, eval_batches(encoded, batch_size=5))
    parts = [
        score_importance(model, eval_batches(encoded.subset(range(rank, 5, 2)), batch_size=2))
        for rank in range(2)
    ]
    for whole, first, second in zip(expected, *parts, strict=True):
        assert whole.min() > 0
        torch.testing.assert_close(first + second, whole, rtol=1e-4, atol=1e-7)
