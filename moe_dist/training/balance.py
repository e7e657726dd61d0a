"""The load-balancing loss of a whole step, whatever ranks and micro-batches it is split over.

It multiplies each expert's mean probability with its share of the step's choices. So the choices
must be known before the first micro-batch's backward. With one micro-batch a rank they are added
over ranks after its forward; with more, a forward without gradients counts them first, which costs
about a third more of the student's time, and nothing has to be kept from one step to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from moe_dist.conversion.heads import answered_kind
from moe_dist.losses.router import load_balancing_loss
from moe_dist.losses.total import LossTerm
from moe_dist.moe.routing import record_routing
from moe_dist.training.collectives import sum_over_ranks
from moe_dist.training.step import GateSum, expert_counts

Choices = dict[str, Tensor]


@torch.no_grad()
def count_choices(model: nn.Module, batch: Mapping[str, Tensor]) -> Choices:
    """Route a micro-batch in training mode (noise, dropout) and count: (E,) by layer."""
    with record_routing() as record:
        answered_kind(model).run(model, batch)
    return expert_counts(record)


def sum_choices(parts: Iterable[Mapping[str, Tensor]]) -> Choices:
    """Add the (E,) choices of a step's micro-batches by layer, over all ranks; collective."""
    total: Choices = {}
    for part in parts:
        for name, choices_E in part.items():
            total[name] = total[name] + choices_E if name in total else choices_E
    if not total:
        return {}
    flat = sum_over_ranks(torch.cat(list(total.values())))
    sizes = [choices_E.numel() for choices_E in total.values()]
    return dict(zip(total, flat.split(sizes), strict=True))


def balance_term(gates: Mapping[str, GateSum], choices: Mapping[str, Tensor]) -> LossTerm:
    """Compute a micro-batch's part of the load-balancing loss, the mean over layers."""
    parts = [
        load_balancing_loss(gate.probability_E, choices[name], gate.top_k)
        for name, gate in gates.items()
    ]
    return LossTerm(torch.stack(parts).mean(), "steps")
