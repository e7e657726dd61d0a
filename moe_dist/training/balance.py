"""The load-balancing loss of a whole step, whatever ranks and micro-batches it is split over.

It multiplies each expert's mean probability with its share of the step's choices; of merged experts
it is the squared variation of their weights in the step's merges and of their load. So the choices
must be known before the first micro-batch's backward. With one micro-batch a rank they are added
over ranks after its forward; with more, a forward without gradients counts them first, which costs
about a third more of the student's time, and nothing has to be kept from one step to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from moe_dist.conversion.heads import answered_kind
from moe_dist.losses.router import load_balancing_loss, variation_of_part
from moe_dist.losses.total import LossTerm
from moe_dist.moe.routing import record_routing
from moe_dist.training.collectives import sum_over_ranks
from moe_dist.training.step import GateSum, StepTerms, expert_counts, gate_sums

Choices = dict[str, Tensor]
"""By layer with a gate what the loss reads of a whole step: (E,) counts of choices; of merged
experts (2, E), their weights in the merges and their load."""


@torch.no_grad()
def count_choices(model: nn.Module, batch: Mapping[str, Tensor]) -> Choices:
    """Route a micro-batch in training mode (noise, dropout) and count, as `made_choices` does."""
    with record_routing() as record:
        answered_kind(model).run(model, batch)
    return _choices(gate_sums(record), expert_counts(record))


def made_choices(computed: StepTerms) -> Choices:
    """Give the choices of a micro-batch whose loss terms are computed."""
    return _choices(computed.gate_sums, computed.tokens_per_expert)


def _choices(gates: Mapping[str, GateSum], counts: Mapping[str, Tensor]) -> Choices:
    return {
        name: counts[name]
        if gate.load_E is None
        else torch.stack([gate.probability_E, gate.load_E]).detach()
        for name, gate in gates.items()
    }


def sum_choices(parts: Iterable[Mapping[str, Tensor]]) -> Choices:
    """Add the choices of a step's micro-batches by layer, over all ranks; collective."""
    total: Choices = {}
    for part in parts:
        for name, choices in part.items():
            total[name] = total[name] + choices if name in total else choices
    if not total:
        return {}
    flat = sum_over_ranks(torch.cat([choices.reshape(-1) for choices in total.values()]))
    split = flat.split([choices.numel() for choices in total.values()])
    return {
        name: own.view_as(choices)
        for (name, choices), own in zip(total.items(), split, strict=True)
    }


def balance_term(gates: Mapping[str, GateSum], choices: Mapping[str, Tensor]) -> LossTerm:
    """Compute a micro-batch's part of the load-balancing loss, the mean over gates."""
    parts = [_balance(gate, choices[name]) for name, gate in gates.items()]
    return LossTerm(torch.stack(parts).mean(), "steps")


def _balance(gate: GateSum, choices: Tensor) -> Tensor:
    if gate.load_E is None:
        return load_balancing_loss(gate.probability_E, choices, gate.top_k)
    weights_E, load_E = choices
    return variation_of_part(gate.probability_E, weights_E) + variation_of_part(gate.load_E, load_E)
