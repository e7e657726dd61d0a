"""Predicting a whole data set, on one process or many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.families import half_fault
from moe_dist.conversion.heads import answered_kind
from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.distributed.position import advancing
from moe_dist.moe.routing import RoutingRecord, record_routing
from moe_dist.training.collectives import num_ranks, own_rank, sum_over_ranks
from moe_dist.training.hardware import answering
from moe_dist.training.step import expert_counts, routing_sums
from moe_dist.training.transfer import ahead


@dataclass(frozen=True)
class Predictions:
    """What a model says about a data set, equal on every rank.

    Args:
        answers: (N, C) float32 in the data set's order, on the CPU: `TaskKind.answer`.
        tokens_per_expert: by layer what `expert_counts` gives.
        routing_sums: by layer with a gate what `routing_sums` gives.
    """

    answers: Tensor
    tokens_per_expert: dict[str, Tensor] = field(default_factory=dict)
    routing_sums: dict[str, Tensor] = field(default_factory=dict)


def predict(
    model: nn.Module,
    encoded: Encoded,
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Predictions:
    """Run a model over a data set, each rank its share; collective.

    It computes in fp32, on a GPU that is fast at it in bf16 (`answering`).

    `eval_batches` gives every rank equally many batches, since with experts on several ranks a
    forward is a meeting of all; what it repeats for that counts once. Of a kind of task that
    writes, experts' tokens are those of the rows and not those that a search tried. The model's
    mode is restored.

    Args:
        model: for any kind of task, on the device.
        encoded: the tokenised data set.
        batch_size: samples for one forward on one rank.
        pad_token_id: fills up shorter samples.
        device: where the model is.
        options: of the task.

    Returns:
        All predictions, on every rank.
    """
    kind, fault = answered_kind(model), half_fault(model)
    was_training = model.training
    model.eval()
    sums = AnswerSums(len(encoded))
    batches = eval_batches(
        encoded,
        batch_size=batch_size,
        pad_token_id=pad_token_id,
        rank=own_rank(),
        world_size=num_ranks(),
    )
    try:
        with torch.no_grad():
            for batch in advancing(ahead(batches, device)):
                with answering(device, fault), record_routing() as record:
                    answers_BC = kind.answer(model, batch, options).float()
                if kind.writes:
                    with answering(device, fault), record_routing() as record:
                        kind.run(model, batch)
                sums.add(batch, answers_BC, record)
    finally:
        model.train(was_training)
    return sums.predictions()


class AnswerSums:
    """Gathers a model's answers batch by batch.

    Args:
        num_samples: N.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._sums_NC: Tensor | None = None
        self._loads: dict[str, Tensor] = {}
        self._gates: dict[str, Tensor] = {}

    def add(self, batch: Mapping[str, Tensor], answers_BC: Tensor, record: RoutingRecord) -> None:
        """Take what a model says about a batch of `eval_batches`, and how it routed there."""
        if self._sums_NC is None:
            self._sums_NC = answers_BC.new_zeros(self._num_samples, answers_BC.shape[-1])
        answers_BC = answers_BC.masked_fill(batch["is_repeat"].unsqueeze(1), 0.0)
        self._sums_NC.index_add_(0, batch["index"], answers_BC)
        add_by_layer(self._loads, expert_counts(record))
        add_by_layer(self._gates, routing_sums(record))

    def predictions(self) -> Predictions:
        """Add up those of all ranks; collective."""
        assert self._sums_NC is not None, "every rank has at least one batch"
        answers_NC = sum_over_ranks(self._sums_NC)
        loads, gates = (
            {name: sum_over_ranks(total).cpu() for name, total in sums.items()}
            for sums in (self._loads, self._gates)
        )
        return Predictions(answers_NC.cpu(), loads, gates)


def add_by_layer(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add to sums by layer, in place."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def gate_entropy(routing_sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Give the mean entropy, in nats, of what each layer's gate says of a token or a merge."""
    return {
        name: float(entropy / count)
        for name, (entropy, count, _, _) in routing_sums.items()
        if count > 0
    }


def expert_load(tokens_per_expert: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Give each expert's share of its layer's tokens; the shares of a layer add up to 1."""
    return {
        name: (count_E.double() / count_E.double().sum().clamp(min=1.0)).tolist()
        for name, count_E in tokens_per_expert.items()
    }
