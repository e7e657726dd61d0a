"""How far a graph's answers lie from the model's own, on texts unlike the one it was traced with.

A graph that keeps the experts, the batch or the length of its example is found out here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.conversion.families import position_limit
from moe_dist.errors import ConversionError
from moe_dist.inference.graphs.tracing import ending_token
from moe_dist.moe.routing import CHOSEN_TASK, use_task

TOLERANCE = 1e-4
"""Largest difference of float32 outputs, as a part of the largest, that rounding may explain."""
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


def check_nearness(model: Any, other: Any) -> Nearness:
    """Measure, of a graph in float32; one that computes something else is a ConversionError."""
    own = model if model.dtype is torch.float32 else copy.deepcopy(model).float()
    nearness = measure_nearness(own, other)
    if not nearness.largest <= TOLERANCE:
        raise ConversionError(
            f"the graph's outputs differ from the model's by {nearness.largest:.1e} of the largest",
            remedy="use the eager or the lean form, and report this: both should compute the same",
        )
    return nearness


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
    special = (config.pad_token_id, config.eos_token_id)
    usual = [i for i in range(int(config.vocab_size)) if i not in special]
    for num_texts, length in _SHAPES:
        length = min(length, position_limit(model) or length)
        chosen = torch.randint(len(usual), (num_texts, length), generator=generator)
        lengths = torch.randint(1, length + 1, (num_texts, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        ids = torch.tensor(usual)[chosen] * mask + (config.pad_token_id or 0) * (1 - mask)
        end = ending_token(model)
        if end is not None:
            ids = ids.scatter(1, mask.sum(dim=1, keepdim=True) - 1, end)
        yield {"input_ids": ids, "attention_mask": mask}


def _both(model: Any, other: Any, batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    real_BS = batch["attention_mask"].bool()
    # The first of several tasks, where none was chosen; others make nothing of it.
    with torch.no_grad(), use_task(0 if getattr(model, CHOSEN_TASK, None) is None else None):
        expected, found = model(**batch), other(**batch)
    for name, values in found.items():
        own = expected[name].float()
        # What stands in the place of padding has no meaning.
        is_by_token = own.shape[:2] == real_BS.shape
        yield (own[real_BS], values[real_BS]) if is_by_token else (own, values)
