"""What trials are compared by: several objectives, the Pareto front, and a goal to be met."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_dist.config.search_section import COSTS, MEASURES, MeasureMode
from moe_dist.errors import ConfigError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GOAL = re.compile(r"^\s*([A-Za-z_0-9]+)\s*(>=|<=|>|<)\s*([-+.0-9eE]+)\s*(%?)\s*$")


@dataclass(frozen=True)
class Goal:
    """A bound on one measure.

    Args:
        metric: the measure.
        sign: `>=`, `<=`, `>` or `<`.
        bound: what it is compared with.
    """

    metric: str
    sign: str
    bound: float

    def is_met(self, metrics: Mapping[str, float]) -> bool:
        """Tell whether a trial meets it; one that was not measured does not."""
        value = metrics.get(self.metric, math.nan)
        return not math.isnan(value) and _OPERATORS[self.sign](value, self.bound)

    def __str__(self) -> str:
        """Write it as it was given."""
        return f"{self.metric} {self.sign} {self.bound:g}"


def parse_goals(text: str, quality_mode: MeasureMode | None = None) -> tuple[Goal, ...]:
    """Read bounds with commas or `and` between, such as `retention>=0.99, parameters<2e7`.

    A ConfigError has every part that cannot be read, and every bound that asks for a worse model;
    of `quality` where `quality_mode` says which way the data's main metric is better.
    """
    modes = MEASURES | {"quality": quality_mode}
    goals, faults = [], []
    for part in re.split(r",|\band\b", text):
        found = _GOAL.match(part)
        if found is None:
            faults.append(
                f"--goal {part.strip()!r} is no bound; write for example retention>=0.99."
            )
            continue
        metric, sign, number, percent = found.groups()
        try:
            bound = float(number) / (100 if percent else 1)
        except ValueError:
            faults.append(f"--goal {part.strip()!r} has no number; write for example 0.99.")
            continue
        if metric not in MEASURES:
            faults.append(f"--goal: {metric} is not measured; use one of {', '.join(MEASURES)}.")
        elif modes[metric] == ("min" if sign[0] == ">" else "max"):
            better, other = ("lower", "<") if sign[0] == ">" else ("higher", ">")
            where = ", as these data are measured" if metric == "quality" else ""
            faults.append(
                f"--goal {part.strip()!r} asks for a worse model, since {better} is better{where}; "
                f"write {metric}{other}{sign[1:]}{number}{percent}."
            )
        goals.append(Goal(metric, sign, bound))
    if faults:
        raise ConfigError(faults, source="--goal")
    return tuple(goals)


def check_cost(metric: str) -> str:
    """Give a measure of `--minimize` back; ConfigError if it is not minimised."""
    if metric not in COSTS:
        fault = f"--minimize {metric} is no cost; use one of {', '.join(COSTS)}."
        raise ConfigError([fault], source="--minimize")
    return metric


def is_better(mode: MeasureMode, value: float, other: float) -> bool:
    """Say whether a value beats another; NaN is worse than anything."""
    if math.isnan(value) or math.isnan(other):
        return math.isnan(other) and not math.isnan(value)
    return value > other if mode == "max" else value < other


def pareto_front(
    rows: Sequence[Mapping[str, float]], objectives: Mapping[str, MeasureMode]
) -> list[int]:
    """Find the positions of the trials that no other one beats.

    They have every objective, and no trial equals them in all and is better in one.
    """
    points = {
        position: [row[name] if mode == "max" else -row[name] for name, mode in objectives.items()]
        for position, row in enumerate(rows)
        if all(not math.isnan(row.get(name, math.nan)) for name in objectives)
    }
    return [
        position
        for position, point in points.items()
        if not any(_dominates(other, point) for other in points.values())
    ]


def _dominates(one: list[float], other: list[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
