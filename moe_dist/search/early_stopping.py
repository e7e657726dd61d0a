"""Who ends trials early: ASHA, Hyperband or the median rule, as Ray Tune has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_dist.search.trials import Trial

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

TIME, OBJECTIVE = "ruled_rung", "objective"
# Finite, since schedulers take quantiles and means of it; and worse than any perplexity or cost.
_WORST = 1e100
"""What a scheduler reads of a report."""


@dataclass(frozen=True)
class Ruling:
    """Who ends trials early.

    Args:
        scheduler: `none`, `asha`, `hyperband`, `median` or `pbt`.
        metric: what it compares.
        mode: `max` or `min`.
        last_rung: the time of a trial's end.
        reduction_factor: see ASHA.
    """

    scheduler: str
    metric: str
    mode: str
    last_rung: int
    reduction_factor: int


def build_scheduler(ruling: Ruling, past: Iterable[Trial]) -> TrialScheduler | None:
    """Build Ray Tune's scheduler, and tell it of trials that are over."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    common = compared_by(ruling)
    if ruling.scheduler == "none" or ruling.last_rung == 1:
        return FIFOScheduler()
    scheduler: TrialScheduler
    if ruling.scheduler == "median":
        scheduler = _median(common)
    else:
        num_rungs = round(math.log(ruling.last_rung, ruling.reduction_factor)) + 1
        scheduler = AsyncHyperBandScheduler(
            # One more than the last rung: a trial ends there by itself.
            max_t=ruling.last_rung + 1,
            grace_period=1,
            reduction_factor=ruling.reduction_factor,
            brackets=min(num_rungs, 3) if ruling.scheduler == "hyperband" else 1,
            **common,
        )
    for trial in past:
        stand_in = _PastTrial(f"past-{trial.number}")
        scheduler.on_trial_add(None, stand_in)
        for report in trial.reports:
            value = ruled_value(report.metrics, ruling)
            scheduler.on_trial_result(None, stand_in, {TIME: report.rung, OBJECTIVE: value})
    return scheduler


def ruled_value(metrics: Mapping[str, float], ruling: Ruling) -> float:
    """Give what trials are compared by; one whose measure is undefined is the worst, not spared."""
    value = metrics.get(ruling.metric, math.nan)
    if math.isfinite(value):
        return min(max(value, -_WORST), _WORST)
    return -_WORST if ruling.mode == "max" else _WORST


def compared_by(ruling: Ruling) -> dict[str, Any]:
    """Say what a scheduler of Ray's compares, in its own words."""
    return {"time_attr": TIME, "metric": OBJECTIVE, "mode": ruling.mode}


def _median(common: dict[str, Any]) -> TrialScheduler:
    from ray.tune.schedulers import MedianStoppingRule

    class Median(MedianStoppingRule):
        def _on_insufficient_samples(self, controller: Any, trial: Any, time: float) -> str:
            # Ray's would let the trial make room for others, and lose what it has trained.
            action: str = self.CONTINUE
            return action

        def on_trial_complete(self, controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
            # Ray's counts the last word of a trial that is not ruled or failed, and breaks on it.
            if TIME in result:
                super().on_trial_complete(controller, trial, result)

    return Median(grace_period=1, min_samples_required=3, **common)


@dataclass(frozen=True)
class _PastTrial:
    """What a scheduler looks at of a trial that another process ran."""

    trial_id: str
