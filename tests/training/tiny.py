"""A BERT, a teacher and a task so small that a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moe_dist.conversion.heads import answered_kind
from moe_dist.data.loaders import Encoded, TrainBatches

VOCAB_SIZE = 40
PAD = 0


def tiny_bert(*, seed: int = 0, dropout: float = 0.1, num_labels: int = 2) -> Any:
    """A random BERT with two layers; regression where it has one label."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config)


def tiny_data(num_samples: int = 24, *, seed: int = 0, regression: bool = False) -> Encoded:
    """Random sentences of 3 to 9 tokens whose label says whether token 5 is among them."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(4, VOCAB_SIZE, size=rng.integers(3, 10)) for _ in range(num_samples)]
    for row in rows[::2]:
        row[0] = 5
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
    labels = np.array([5 in row for row in rows])
    return Encoded(
        input_ids=np.concatenate(rows).astype(np.int32),
        token_type_ids=np.zeros(offsets[-1], np.int8),
        offsets=offsets,
        labels=labels.astype(np.float32 if regression else np.int64),
        sample_ids=np.arange(100, 100 + num_samples, dtype=np.int64),
    )


def tiny_batches(encoded: Encoded | None = None, **changes: Any) -> TrainBatches:
    """Three steps of eight samples an epoch, unless told otherwise."""
    options: dict[str, Any] = {"batch_size": 8, "pad_token_id": PAD, "seed": 1} | changes
    return TrainBatches(encoded if encoded is not None else tiny_data(), **options)


def tiny_student(
    teacher: Any, *, router: str = "token_gate", num_experts: int = 4, **options: Any
) -> Any:
    """The teacher's neurons split over experts of 12, of which 8 are tied."""
    from moe_dist.conversion import dense_to_moe, plan_partition

    scores = [torch.arange(32.0) for _ in range(2)]
    plan = plan_partition(
        scores, num_experts=num_experts, expert_size=12, num_shared_neurons=8, tie_shared=True
    )
    return dense_to_moe(teacher, plan, router=router, **options)


def tiny_batch(encoded: Encoded | None = None) -> dict[str, torch.Tensor]:
    """The first micro-batch of the first step."""
    return next(iter(tiny_batches(encoded).epoch(0))).micro_batches[0]


def padded(batch: dict[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """The same samples with more padding."""
    wide = {
        name: torch.nn.functional.pad(column, (0, columns), value=PAD)
        for name, column in batch.items()
        if column.dim() == 2
    }
    return batch | wide


def model_inputs(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give what a model takes of a batch."""
    return answered_kind(model).inputs(model, batch)
