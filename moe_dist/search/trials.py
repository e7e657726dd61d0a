"""The trials of a sweep, and the file that an interrupted sweep continues from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_dist.config.search_section import MeasureMode
from moe_dist.search.objectives import pareto_front

LOG_NAME = "trials.jsonl"
BASELINE = 0
"""The number of the trial that is the recipe as it stands; those of the space begin at 1."""
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Report:
    """What a trial measured at one rung.

    Args:
        rung: its time, in units of the sweep's first rung.
        step: optimizer steps done.
        metrics: values by name.
    """

    rung: int
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class WeightSegment:
    """Steps of training behind a trial's weights, on one set of values.

    Args:
        step: optimizer steps before it.
        trial: number of the trial that trained it.
        overrides: what the recipe was changed by.
    """

    step: int
    trial: int
    overrides: dict[str, Any]


@dataclass
class Trial:
    """One trial.

    Args:
        number: counted from 1; `BASELINE` is the recipe as it stands.
        drawn: values of the space, by path.
        overrides: what the recipe is changed by.
        status: `stopped` is ended early by the scheduler; `running` was interrupted.
        reports: in order.
        num_steps: optimizer steps of the whole training.
        seconds: of work, from its start on a worker to its end.
        message: why it failed.
        weight_history: what its weights were trained by, from the first step on; more than one
            segment where it took over the weights of another trial. `drawn` and `overrides` are
            those of the last.
    """

    number: int
    drawn: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    status: Status = "running"
    reports: list[Report] = field(default_factory=list)
    num_steps: int = 0
    seconds: float = 0.0
    message: str = ""
    weight_history: list[WeightSegment] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """The last measures; empty before the first."""
        return self.reports[-1].metrics if self.reports else {}

    @property
    def steps_done(self) -> int:
        """Optimizer steps up to the last report."""
        return self.reports[-1].step if self.reports else 0

    @property
    def is_over(self) -> bool:
        """Whether it is not to be run again."""
        return self.status in ("finished", "stopped")

    def value(self, metric: str) -> float:
        """Give one measure; NaN where it is missing."""
        return self.metrics.get(metric, math.nan)


class TrialLog:
    """What happened to each trial, one JSON line for each event; written by the driver alone.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: dict[int, Trial] = {}
        self._is_torn = False
        if path.exists():
            text = path.read_text(encoding="utf-8")
            # A killed driver may have left half a line.
            self._is_torn = text != "" and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    self._apply(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    continue

    def started(self, number: int, drawn: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
        """Note that a trial begins, again if it was interrupted."""
        self._note("started", number, drawn=dict(drawn), overrides=dict(overrides))

    def took_over(
        self,
        number: int,
        strong: int,
        step: int,
        drawn: Mapping[str, Any],
        overrides: Mapping[str, Any],
    ) -> None:
        """Note that a trial goes on from another's weights, with values of its own."""
        values = {"drawn": dict(drawn), "overrides": dict(overrides)}
        self._note("took_over", number, strong=strong, step=step, **values)

    def reported(self, number: int, report: Report, num_steps: int) -> None:
        """Note what a trial measured."""
        metrics = {key: value for key, value in report.metrics.items() if math.isfinite(value)}
        self._note(
            "reported",
            number,
            rung=report.rung,
            step=report.step,
            num_steps=num_steps,
            metrics=metrics,
        )

    def ended(self, number: int, status: Status, seconds: float, message: str = "") -> None:
        """Note how a trial ended."""
        self._note("ended", number, status=status, seconds=seconds, message=message)

    def _note(self, event: str, number: int, **entries: Any) -> None:
        entry = {"event": event, "number": number, "time": time.time(), **entries}
        self._apply(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if self._is_torn else "") + json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._is_torn = False

    def _apply(self, entry: Mapping[str, Any]) -> None:
        number, event = int(entry["number"]), entry["event"]
        if event == "started":
            overrides = dict(entry["overrides"])
            self.trials[number] = Trial(
                number,
                dict(entry["drawn"]),
                overrides,
                weight_history=[WeightSegment(0, number, overrides)],
            )
            return
        trial = self.trials[number]
        if event == "took_over":
            trial.drawn, trial.overrides = dict(entry["drawn"]), dict(entry["overrides"])
            segment = WeightSegment(entry["step"], number, trial.overrides)
            trial.weight_history = [*self.trials[entry["strong"]].weight_history, segment]
        elif event == "reported":
            trial.reports.append(Report(entry["rung"], entry["step"], dict(entry["metrics"])))
            trial.num_steps = entry["num_steps"]
        else:
            trial.status, trial.seconds = entry["status"], entry["seconds"]
            trial.message = entry["message"]


def rank_trials(trials: Sequence[Trial], metric: str, mode: str) -> list[Trial]:
    """Order the finished trials that have the measure, best first; of equal ones the earlier."""
    sign = -1.0 if mode == "max" else 1.0
    whole = [t for t in trials if t.status == "finished" and not math.isnan(t.value(metric))]
    return sorted(whole, key=lambda trial: (sign * trial.value(metric), trial.number))


def finished_front(trials: Sequence[Trial], objectives: Mapping[str, MeasureMode]) -> list[Trial]:
    """Find the trials trained to the end that no other one beats; see `pareto_front`."""
    whole = [trial for trial in trials if trial.status == "finished"]
    return [whole[index] for index in pareto_front([t.metrics for t in whole], objectives)]
