"""A sweep's pictures: parallel coordinates, importance of keys, Pareto front, learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.config.search_space import is_number
from moe_dist.search.trials import BASELINE, Trial, finished_front

from ..console import quantity
from ..report.plots import COLOURS, FAINT, INK, new_figure, plot_style, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MAX_AXES = 10
_GAP = 0.06


def plot_curves(
    trials: Sequence[Trial], metric: str, path: Path, *, best: int | None = None
) -> Path:
    """Draw what each trial measured at each rung, as a PNG; `best` is the report's."""
    with plot_style():
        figure = new_figure(8.0, 4.4)
        axes = figure.subplots()
        for trial in trials:
            points = [(r.step, r.metrics[metric]) for r in trial.reports if metric in r.metrics]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            stopped = trial.status == "stopped"
            colour, width = (FAINT, 1.0) if stopped else (COLOURS[0], 1.4)
            label = None
            if trial.number == BASELINE:
                colour, width, label = INK, 2.0, "the recipe as it stands"
            elif trial.number == best:
                colour, width, label = COLOURS[1], 2.2, f"trial {trial.number}, the best"
            axes.plot(steps, values, color=colour, lw=width, marker="o", ms=3, label=label)
            if stopped:
                axes.plot(steps[-1], values[-1], color=FAINT, marker="x", ms=6)
        axes.set_xlabel("optimizer step")
        _label(axes.yaxis, metric)
        axes.set_title("Learning curves by rung (×: ended early)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right")
        return save_figure(figure, path)


def plot_importance_of_keys(shares: Mapping[str, float], metric: str, path: Path) -> Path:
    """Draw how much each key matters, as a PNG; shares by path, the largest first."""
    with plot_style():
        figure = new_figure(7.0, 1.6 + 0.36 * len(shares))
        axes = figure.subplots()
        names = list(shares)
        axes.barh(names, [100 * shares[name] for name in names], color=COLOURS[0], height=0.7)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"share of the permutation importance for {metric} (%)")
        axes.set_title("Which keys matter")
        return save_figure(figure, path)


def plot_fronts(
    trials: Sequence[Trial], metric: str, costs: Sequence[str], path: Path, *, maximise: bool = True
) -> Path:
    """Draw the objective against each cost, and the trials that no other beats in both.

    Trials that ended early are faint. Costs are better when low, the metric as `maximise` says.
    """
    with plot_style():
        figure = new_figure(5.2 * len(costs) + 0.6, 4.4)
        for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
            _draw_front(axes, trials, metric, cost, maximise=maximise)
        return save_figure(figure, path)


def plot_parallel(trials: Sequence[Trial], metric: str, path: Path) -> Path:
    """Draw each trial, in a PNG, as a line through its values, coloured by the objective."""
    import matplotlib

    shown = [t for t in trials if t.drawn and not math.isnan(t.value(metric))]
    names = sorted({name for trial in shown for name in trial.drawn})[:MAX_AXES]
    scales = [_Scale([trial.drawn.get(name) for trial in shown]) for name in names]
    values = [trial.value(metric) for trial in shown]
    low, high = min(values, default=0.0), max(values, default=1.0)
    spread = (high - low) or 1.0
    colours = matplotlib.colormaps["viridis"]
    with plot_style():
        figure = new_figure(max(6.0, 1.6 * (len(names) + 1)), 4.6)
        axes = figure.subplots()
        for trial in sorted(shown, key=lambda one: one.value(metric)):
            share = (trial.value(metric) - low) / spread
            heights = [scale(trial.drawn.get(n)) for n, scale in zip(names, scales, strict=True)]
            faint = trial.status == "stopped"
            axes.plot(
                range(len(names) + 1),
                [*heights, share],
                color=colours(0.95 * share),
                lw=1.0 if faint else 2.0,
                alpha=0.4 if faint else 0.9,
            )
        for x, (name, scale) in enumerate(zip(names, scales, strict=True)):
            _label_axis(axes, x, name.rpartition(".")[2], scale.ticks)
        write = quantity if metric in _COUNTS else "{:.4g}".format
        ticks = [(0.0, write(low)), (1.0, write(high))]
        _label_axis(axes, len(names), metric, ticks)
        axes.set(xlim=(-0.3, len(names) + 0.5), ylim=(-0.15, 1.22))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title("Trials and what they reached")
        return save_figure(figure, path)


class _Scale:
    """Places the values of one key between 0 and 1; a key that was not drawn lies below."""

    def __init__(self, values: Sequence[Any]) -> None:
        present = [value for value in values if value is not None]
        self._numeric = all(map(is_number, present))
        if not self._numeric:
            self._names = sorted({str(value) for value in present})
            last = max(1, len(self._names) - 1)
            self.ticks = [(index / last, name) for index, name in enumerate(self._names)]
            return
        self._low, self._high = min(present), max(present)
        self._log = self._low > 0 and self._high / self._low > 20
        self.ticks = [(0.0, f"{self._low:.3g}"), (1.0, f"{self._high:.3g}")]

    def __call__(self, value: Any) -> float:
        if value is None:
            return -_GAP
        if not self._numeric:
            return self._names.index(str(value)) / max(1, len(self._names) - 1)
        if self._low == self._high:
            return 0.5
        if self._log:
            return math.log(value / self._low) / math.log(self._high / self._low)
        return (value - self._low) / (self._high - self._low)


def _label_axis(axes: Axes, x: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([x, x], [-2 * _GAP, 1.0 + _GAP], color=FAINT, lw=1.0, zorder=0)
    axes.text(x, 1.0 + 2 * _GAP, name, ha="center", va="bottom", fontsize=9, weight="bold")
    # Upon the lines, which would else run through the words.
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for height, text in ticks:
        axes.text(x + 0.05, height, text, fontsize=8, va="center", color=INK, bbox=paper)


def _draw_front(
    axes: Axes, trials: Sequence[Trial], metric: str, cost: str, *, maximise: bool
) -> None:
    for trial in trials:
        if math.isnan(trial.value(cost)) or math.isnan(trial.value(metric)):
            continue
        done = trial.status == "finished"
        colour = INK if trial.number == BASELINE else COLOURS[0] if done else FAINT
        axes.plot(trial.value(cost), trial.value(metric), "o" if done else "x", color=colour, ms=6)
    objectives: Mapping[str, Any] = {metric: "max" if maximise else "min", cost: "min"}
    front = sorted(finished_front(trials, objectives), key=lambda trial: trial.value(cost))
    axes.step(
        [trial.value(cost) for trial in front],
        [trial.value(metric) for trial in front],
        where="post",
        color=COLOURS[1],
        lw=1.6,
        zorder=1,
    )
    labels: dict[tuple[float, float], list[str]] = {}
    for trial in front:
        labels.setdefault((trial.value(cost), trial.value(metric)), []).append(str(trial.number))
    for point, numbers in labels.items():
        said = ", ".join(numbers[:4]) + (" …" if len(numbers) > 4 else "")
        axes.annotate(said, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    _label(axes.xaxis, cost)
    _label(axes.yaxis, metric)
    axes.set_title(f"{metric} against {cost.replace('_', ' ')}")


def _label(axis: Axis, measure: str) -> None:
    """Name an axis by its measure; counts have M and G, as in tables."""
    axis.set_label_text(_UNITS.get(measure, measure))
    if measure in _COUNTS:
        from matplotlib.ticker import EngFormatter, MaxNLocator

        axis.set_major_locator(MaxNLocator(_MAX_TICKS))
        axis.set_major_formatter(EngFormatter(sep=" "))


_UNITS = {
    "flops": "FLOPs for one token",
    "latency": "latency (ms)",
    "active_parameters": "active parameters",
}
_COUNTS = ("flops", "parameters", "active_parameters")
# More of such labels would touch each other.
_MAX_TICKS = 4
