"""Joining named loss terms into the one number that is minimised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "warmup", "decay", "delayed"]
CountKind = Literal["samples", "tokens", "targets", "steps"]


@dataclass(frozen=True)
class LossTerm:
    """One loss of one micro-batch on one rank, before division.

    Args:
        sum: scalar float32, summed over what `count_kind` names, with its graph.
        count_kind: what to divide by, counted over all ranks and micro-batches of the step;
            "targets" are the tokens that a model is to predict, one a sample where it answers
            the sample as a whole; "steps", of which there is one, for parts that add up to the
            step's value as they are.
        more: what is added to it after its own division.
    """

    sum: Tensor
    count_kind: CountKind
    more: tuple[LossTerm, ...] = ()

    def divided(self, counts: Mapping[CountKind, int]) -> Tensor:
        """Divide by the counts of the whole step."""
        own = self.sum / max(1, counts[self.count_kind])
        for part in self.more:
            own = own + part.divided(counts)
        return own


@dataclass(frozen=True)
class LossWeight:
    """The coefficient of a loss term as a function of the step.

    Args:
        weight: the full coefficient.
        schedule: ``constant``; ``warmup``, linear from ``weight / num_steps`` to the weight;
            ``decay``, linear from the weight to 0; or ``delayed``, 0 and then the weight.
        num_steps: how long the warm-up, the decay or the delay takes.
    """

    weight: float
    schedule: Schedule = "constant"
    num_steps: int = 0

    def at(self, step: int) -> float:
        """Return the coefficient after `step` optimizer steps."""
        if self.schedule == "warmup":
            # From the first step on the term counts a little: a step without any loss is none.
            return self.weight * min(1.0, (step + 1) / max(1, self.num_steps))
        if self.schedule == "decay":
            return self.weight * max(0.0, 1.0 - step / max(1, self.num_steps))
        if self.schedule == "delayed":
            return 0.0 if step < self.num_steps else self.weight
        return self.weight


def weighted_total(
    terms: Mapping[str, LossTerm],
    weights: Mapping[str, float],
    counts: Mapping[CountKind, int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divide each term by its count, weigh it and add all.

    Args:
        terms: the terms of one micro-batch on one rank.
        weights: a coefficient for each term; a term at 0 stays out of the graph.
        counts: of the whole optimizer step, over ranks and micro-batches.

    Returns:
        The weighted sum with its graph, and each term divided but unweighted, detached, with
        ``total`` among them. Both are this micro-batch's part: the parts of a step add up to it.

    Raises:
        ValueError: if a term has no weight.
    """
    missing = sorted(set(terms) - set(weights))
    if missing:
        raise ValueError(f"loss terms without a weight: {', '.join(missing)}")
    divided = {name: term.divided(counts) for name, term in terms.items()}
    parts = [weights[name] * value for name, value in divided.items() if weights[name] != 0.0]
    if not parts:
        # A schedule may switch everything off for a while; the graph must still exist.
        parts = [0.0 * value for value in divided.values()]
    total = torch.stack(parts).sum()
    return total, {name: value.detach() for name, value in divided.items()} | {
        "total": total.detach()
    }
