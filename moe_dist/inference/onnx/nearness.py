"""How far a graph's answers lie from the model's own, on texts unlike the one it was traced with.

A graph that keeps the experts, the batch or the length of its example is found out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.conversion.families import position_limit
from moe_dist.conversion.heads import read_heads
from moe_dist.moe.routing import CHOSEN_TASK, use_task

_SHAPES = ((1, 1), (1, 9), (5, 17), (3, 40))
"""Texts and tokens: one token, other batches and other lengths than the example's."""


@dataclass(frozen=True)
class Nearness:
    """Differences of outputs, as parts of the largest that the model itself gives.

    Attributes:
        largest: of any number.
        mean: over all numbers.
    """

    largest: float
    mean: float


def measure_nearness(model: Any, other: Any) -> Nearness:
    """Compare two models of the same arguments on random tokens, with padding."""
    parts = [
        (expected - found).abs().flatten() / expected.abs().max()
        for batch in trial_batches(model)
        for expected, found in _both(model, other, batch)
    ]
    errors = torch.cat(parts)
    return Nearness(float(errors.max()), float(errors.mean()))


def trial_batches(model: Any) -> Iterator[dict[str, Tensor]]:
    """Random tokens, none of them padding, of texts that end at different places."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    usual = [i for i in range(int(config.vocab_size)) if i != config.pad_token_id]
    for num_texts, length in _SHAPES:
        length = min(length, position_limit(model) or length)
        chosen = torch.randint(len(usual), (num_texts, length), generator=generator)
        lengths = torch.randint(1, length + 1, (num_texts, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        ids = torch.tensor(usual)[chosen] * mask + (config.pad_token_id or 0) * (1 - mask)
        yield {"input_ids": ids, "attention_mask": mask}


def _both(model: Any, other: Any, batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    real_BS = batch["attention_mask"].bool()
    names_task = read_heads(model) and getattr(model, CHOSEN_TASK, None) is None
    with torch.no_grad(), use_task(0 if names_task else None):
        expected, found = model(**batch), other(**batch)
    for name, values in found.items():
        own = expected[name].float()
        # What stands in the place of padding has no meaning.
        is_by_token = own.shape[:2] == real_BS.shape
        yield (own[real_BS], values[real_BS]) if is_by_token else (own, values)
