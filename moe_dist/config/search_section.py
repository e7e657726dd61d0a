"""What a recipe says about searching: the space, what is measured, and how long."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field

from moe_dist.config.data_section import LOWER_IS_BETTER, Metric
from moe_dist.config.sections import (
    MAX_SAMPLES,
    MAX_WORKERS,
    Integer,
    Number,
    Section,
    Switch,
)

MeasureMode = Literal["max", "min"]
COSTS = ("latency", "flops", "parameters", "active_parameters")
MEASURES: dict[str, MeasureMode] = {
    "quality": "max",
    "retention": "max",
    **{name: "min" if name in LOWER_IS_BETTER else "max" for name in get_args(Metric)},
    **dict.fromkeys(COSTS, "min"),
}
"""What a trial is measured by, and which way is better; of `quality` only the data know it."""


class SearchConfig(Section):
    """What `moe-dist search` tries, and how."""

    setting_kind = "observation"

    space: dict[str, Any] = Field(
        default_factory=dict,
        description="What is tried: a mapping from a dotted key to one of `{choice: [...]}`, "
        "`{uniform: [low, high]}`, `{loguniform: [low, high]}`, `{integers: [low, high]}` or "
        "`{from: TABLE}`, with conditions (`when`, `otherwise`); see docs/search.md.",
    )
    metric: str = Field(
        default="quality",
        description="What is searched for: `quality` (the main metric on the rows of "
        "`data.holdout_samples`, else on the dev rows), `retention` (quality over the teacher's), "
        "the name of another metric of the task, `latency` (ms), `flops` (for one token), "
        "`parameters` or `active_parameters`.",
    )
    mode: Literal["auto", "max", "min"] = Field(
        default="auto", description="Which way is better; `auto` knows it for each metric."
    )
    objectives: dict[str, Literal["auto", "max", "min"]] = Field(
        default_factory=dict,
        description="Several metrics at once instead of `search.metric`, such as "
        "`{quality: max, latency: min}` (or `auto`); the first one ranks the trials, and the "
        "report has the Pareto front.",
    )
    num_trials: Integer = Field(
        default=16,
        ge=1,
        le=1_000_000,
        description="Points of the space that are tried, beside the recipe's own.",
    )
    baseline: Switch = Field(
        default=True,
        description="Train the recipe as it stands too, to the end: what the best must beat.",
    )
    time_budget_s: Number | None = Field(
        default=None,
        gt=0,
        description="Seconds after which the sweep ends, earlier parts of an interrupted one "
        "included; what is not finished by then is left.",
    )
    worker_budget_s: Number | None = Field(
        default=None,
        gt=0,
        description="What the sweep may cost: seconds of training summed over all workers of all "
        "trials. No trial is started after it is spent.",
    )
    scheduler: Literal["auto", "none", "asha", "hyperband", "median", "pbt"] = Field(
        default="auto",
        description="Who ends bad trials early: `asha`, `hyperband` (its asynchronous form, ASHA "
        "with several brackets), `median` (below the median of the others), `none`. `pbt` ends "
        "none: at each rung the worst quarter goes on from the weights of the best, with other "
        "values of what can change in flight (docs/search.md). `auto` takes `asha`, and `none` "
        "where there are several objectives.",
    )
    algorithm: Literal["auto", "random", "grid", "tpe"] = Field(
        default="auto",
        description="Who proposes points: `random`, `grid` (every combination), `tpe` (Optuna; "
        "with several objectives its multi-objective form). `auto` takes `tpe`, and `random` for "
        "the population of `pbt`.",
    )
    rungs: Integer = Field(
        default=3,
        ge=1,
        le=1_000,
        description="How often a trial is measured and may be ended; the last time is its end. "
        "`asha` and `hyperband` put them at 1, 1/F, 1/F² … of the steps, where F is "
        "`search.reduction_factor`, the others evenly.",
    )
    reduction_factor: Integer = Field(
        default=3,
        ge=2,
        le=1_000,
        description="`asha` and `hyperband` let about one in so many go on.",
    )
    confirm_seeds: Integer = Field(
        default=0,
        ge=0,
        le=10_000,
        description="After the trials, train the best and the recipe as it stands again with so "
        "many other seeds of the student, measured on the dev rows, to tell the margin from the "
        "noise of seeds; 0 or at least 2.",
    )
    max_concurrent: Integer | None = Field(
        default=None,
        ge=1,
        le=MAX_WORKERS,
        description="Trials at a time; as many as the cluster has worker slots for when not given.",
    )
    latency_batch_size: Integer = Field(
        default=1, ge=1, le=MAX_SAMPLES, description="Sentences in a batch for `latency`."
    )

    @property
    def wanted(self) -> dict[str, MeasureMode]:
        """The objectives, the one that ranks trials first; of `quality` see `directed`."""
        modes = self.objectives or {self.metric: self.mode}
        return {
            name: MEASURES.get(name, "max") if mode == "auto" else mode
            for name, mode in modes.items()
        }

    def directed(self, *, higher_is_better: bool) -> SearchConfig:
        """Say for the data at hand which way `quality`, their main metric, is better."""
        better: MeasureMode = "max" if higher_is_better else "min"
        objectives = {
            name: better if name == "quality" and mode == "auto" else mode
            for name, mode in self.objectives.items()
        }
        is_open = not objectives and self.metric == "quality" and self.mode == "auto"
        # Where nothing is to be said it stays as it is, as sweeps of earlier versions have it.
        mode = better if is_open and not higher_is_better else self.mode
        return self.model_copy(update={"objectives": objectives, "mode": mode})

    @property
    def chosen_scheduler(self) -> str:
        """The scheduler, `auto` resolved."""
        if self.scheduler != "auto":
            return self.scheduler
        return "none" if len(self.wanted) > 1 else "asha"

    @property
    def chosen_algorithm(self) -> str:
        """The algorithm, `auto` resolved."""
        if self.algorithm != "auto":
            return self.algorithm
        return "random" if self.is_population else "tpe"

    @property
    def is_population(self) -> bool:
        """Whether weak trials take over the weights of strong ones."""
        return self.scheduler == "pbt"
