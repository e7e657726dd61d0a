"""Predicting a whole data set, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.moe.routing import record_routing
from moe_dist.training.collectives import max_over_ranks, num_ranks, own_rank, sum_over_ranks
from moe_dist.training.step import expert_counts, model_inputs
from moe_dist.training.transfer import to_device


@dataclass(frozen=True)
class Predictions:
    """What a model says about a data set, equal on every rank.

    Args:
        logits: (N, C) float32 in the data set's order, on the CPU.
        tokens_per_expert: (E,) counts of real tokens by layer.
    """

    logits: Tensor
    tokens_per_expert: dict[str, Tensor] = field(default_factory=dict)

    def values(self, *, is_regression: bool) -> Tensor:
        """Turn logits into what metrics compare with labels.

        Args:
            is_regression: the single output itself, and not the likeliest class.

        Returns:
            (N,) floats or class ids.
        """
        return self.logits[:, 0] if is_regression else self.logits.argmax(dim=-1)


def predict(
    model: nn.Module,
    encoded: Encoded,
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Predictions:
    """Run a model over a data set, each rank its share; collective.

    Every rank runs equally many forwards, since with experts on several ranks a forward is a
    meeting of all: one that has run out of batches repeats a batch and throws the answer away.
    The model's mode is restored.

    Args:
        model: a classifier or regressor, on the device.
        encoded: the tokenised data set.
        batch_size: samples for one forward on one rank.
        pad_token_id: fills up shorter samples.
        device: where the model is.
        autocast: opens the compute precision.

    Returns:
        All predictions, on every rank.
    """
    was_training = model.training
    model.eval()
    logits_NC: Tensor | None = None
    loads: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for batch, counts in _shares(encoded, batch_size, pad_token_id, device):
                with autocast(), record_routing() as record:
                    logits_BC = model(**model_inputs(batch)).logits.float()
                if logits_NC is None:
                    logits_NC = torch.zeros(len(encoded), logits_BC.shape[-1], device=device)
                if counts:
                    logits_NC[batch["index"]] = logits_BC
                for name, count_E in expert_counts(record).items():
                    # Also where nothing counts, so that every rank sums the same layers.
                    loads.setdefault(name, torch.zeros_like(count_E)).add_(count_E * counts)
    finally:
        model.train(was_training)
    assert logits_NC is not None, "every rank runs at least one batch"
    sum_over_ranks(logits_NC)
    loads = {name: sum_over_ranks(count_E).cpu() for name, count_E in loads.items()}
    return Predictions(logits_NC.cpu(), loads)


def expert_load(tokens_per_expert: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Give each expert's share of its layer's tokens.

    Args:
        tokens_per_expert: (E,) counts by layer.

    Returns:
        Shares that add up to 1, by layer.
    """
    return {
        name: (count_E.double() / count_E.double().sum().clamp(min=1.0)).tolist()
        for name, count_E in tokens_per_expert.items()
    }


def _shares(
    encoded: Encoded, batch_size: int, pad_token_id: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Yield this rank's batches and whether they count, equally many on every rank."""
    rank, world_size = own_rank(), num_ranks()

    def share_of(which: int) -> Iterator[dict[str, Tensor]]:
        return eval_batches(
            encoded,
            batch_size=batch_size,
            pad_token_id=pad_token_id,
            rank=which,
            world_size=world_size,
        )

    # Counted before the first forward: a rank that asked only after its last one would wait here
    # for others that wait for it inside theirs.
    batches = list(share_of(rank))
    missing = max_over_ranks(len(batches), device) - len(batches)
    for batch in batches:
        yield to_device(batch, device), True
    if missing:
        spare = to_device(next(share_of(0)), device)
        for _ in range(missing):
            yield spare, False
