"""The chain's pictures: importance of neurons, loss terms over steps, load of the experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.metric_log import MetricRecord, series
from moe_dist.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_PREFIX = "train/loss/"
TOTAL_LOSS = "train/loss/total"
DEV_PREFIX = "dev/"
# Okabe and Ito's colours, which all readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#222222"
FAINT = "#8a8a8a"
MAX_LABELLED_EXPERTS = 16
STYLE = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    # A corner that says "1e7" or "+0.84" is easily overlooked.
    "axes.formatter.useoffset": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def plot_importance(
    scores: Sequence[Any],
    path: Path,
    *,
    num_kept: int,
    num_shared: int = 0,
    layer_names: Sequence[str] | None = None,
) -> Path:
    """Draw how importance spreads over the neurons of each layer, and what a student keeps.

    Args:
        scores: one vector of F scores for each layer (arrays or CPU tensors).
        path: the PNG to write.
        num_kept: distinct neurons of a layer that its experts hold together.
        num_shared: how many of them every expert holds.
        layer_names: names for the layers; numbers by default.

    Returns:
        The path.
    """
    import numpy as np

    with plot_style():
        figure = new_figure(10.0, 4.4)
        curves_axes, bars_axes = figure.subplots(1, 2, width_ratios=(3, 2))
        names = list(layer_names or [str(index) for index in range(len(scores))])
        shades = _shades(len(scores))
        kept_shares = []
        for score, name, shade in zip(scores, names, shades, strict=True):
            ordered = np.sort(np.asarray(score, dtype=np.float64))[::-1]
            total = ordered.sum() or 1.0
            shares = np.concatenate([[0.0], np.cumsum(ordered) / total])
            kept_shares.append(float(shares[min(num_kept, len(ordered))]))
            neurons = np.linspace(0.0, 100.0, len(shares))
            curves_axes.plot(neurons, 100 * shares, color=shade, lw=1.8, label=name)
        num_neurons = max(len(score) for score in scores)
        _mark_neurons(curves_axes, num_kept, num_neurons, "kept")
        if num_shared:
            _mark_neurons(curves_axes, num_shared, num_neurons, "shared")
        curves_axes.set(
            xlim=(0, 100),
            ylim=(0, 101),
            xlabel="neurons of the layer, most important first (%)",
            ylabel="share of the layer's importance (%)",
        )
        curves_axes.set_title("Importance held by the top neurons", pad=20)
        curves_axes.legend(
            title="layer", loc="lower right", ncols=math.ceil(len(names) / 8), fontsize=9
        )
        _draw_kept_bars(bars_axes, names, kept_shares, shades)
        bars_axes.set_title(f"Kept with {num_kept} of {num_neurons} neurons", pad=20)
        return save_figure(figure, path)


def plot_losses(records: Sequence[MetricRecord], path: Path, *, title: str = "Loss terms") -> Path:
    """Draw the loss terms over steps, and below them the dev metrics where there are any."""
    kept = list(records)
    names = sorted({name for record in kept for name in record.metrics})
    terms = [name for name in names if name.startswith(LOSS_PREFIX) and name != TOTAL_LOSS]
    if TOTAL_LOSS in names and len(terms) != 1:
        terms.append(TOTAL_LOSS)
    metrics = [name for name in names if name.startswith(DEV_PREFIX)]
    with plot_style():
        figure = new_figure(8.0, 6.0 if metrics else 4.2)
        if metrics:
            axes, metric_axes = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
        else:
            axes, metric_axes = figure.subplots(), None
        for term, colour in zip(terms, _cycle(len(terms)), strict=True):
            _draw_term(axes, kept, term, INK if term == TOTAL_LOSS else colour)
        _set_loss_scale(axes)
        axes.set_title(title)
        axes.set_ylabel("loss")
        if terms:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        else:
            axes.text(0.5, 0.5, "no loss was logged", transform=axes.transAxes, ha="center")
        if metric_axes is not None:
            _draw_metrics(metric_axes, kept, metrics)
        (metric_axes or axes).set_xlabel("optimizer step")
        return save_figure(figure, path)


def plot_expert_load(loads: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Draw, as a heat map, each layer's shares of tokens by expert, which add up to 1."""
    import numpy as np

    num_experts = max((len(shares) for shares in loads.values()), default=1)
    grid = np.full((max(1, len(loads)), num_experts), np.nan)
    for row, shares in enumerate(loads.values()):
        grid[row, : len(shares)] = shares
    # White is an even share, so that colour means imbalance and nothing else.
    relative = grid * num_experts
    spread = max(0.25, float(np.nanmax(np.abs(relative - 1.0), initial=0.0)))
    with plot_style():
        height = 1.9 + 0.42 * max(1, len(loads))
        figure = new_figure(min(12.0, 4.0 + 0.75 * num_experts), height)
        axes = figure.subplots()
        image = axes.imshow(
            relative, cmap="RdBu_r", vmin=1.0 - spread, vmax=1.0 + spread, aspect="auto"
        )
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(_ticks(num_experts))
        axes.set_yticks(range(len(loads)), [short_layer_name(name) for name in loads])
        axes.set(xlabel="expert", ylabel="layer")
        axes.set_title("Share of tokens for each expert")
        if num_experts <= MAX_LABELLED_EXPERTS:
            _label_cells(axes, grid, relative, spread)
        bar = figure.colorbar(image, ax=axes, label="share / even share")
        bar.outline.set_visible(False)
        # The colours reach as far below an even share as above it; a share does not.
        bar.ax.set_ylim(bottom=max(0.0, 1.0 - spread))
        return save_figure(figure, path)


def plot_style() -> Any:
    """Give all pictures one look: a context to draw in."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, measured in inches."""
    # Not pyplot, which keeps every figure alive and wants a main thread.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG, whole or not at all; its directory is made."""
    with whole_file(path) as beside:
        figure.savefig(beside, format="png", dpi=150, facecolor="white")
    return path


def _shades(count: int) -> list[Any]:
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    return [colours(0.9 * index / max(1, count - 1)) for index in range(count)]


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _mark_neurons(axes: Axes, count: int, total: int, word: str) -> None:
    kept = 100.0 * count / total
    axes.axvline(kept, color=INK, lw=1.0, ls="--", zorder=1)
    axes.text(
        kept,
        1.015,
        f"{word} {count}",
        transform=axes.get_xaxis_transform(),
        ha="center",
        fontsize=9,
    )


def _draw_kept_bars(
    axes: Axes, names: Sequence[str], shares: Sequence[float], shades: Sequence[Any]
) -> None:
    rows = range(len(names))
    axes.barh(rows, [100 * share for share in shares], color=list(shades), height=0.7)
    size = 9 if len(names) <= 12 else 7
    for row, share in zip(rows, shares, strict=True):
        axes.text(100 * share + 1.5, row, f"{100 * share:.0f} %", va="center", fontsize=size)
    axes.set_yticks(rows, names, fontsize=size)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlim=(0, 115), xlabel="share of importance kept (%)", ylabel="layer")
    axes.set_xticks(range(0, 101, 25))


def _draw_term(axes: Axes, records: list[MetricRecord], name: str, colour: str) -> None:
    steps, values = series(records, name)
    label = name.removeprefix(LOSS_PREFIX).replace("_", " ")
    width = 2.2 if name == TOTAL_LOSS else 1.6
    if len(values) < 20:
        axes.plot(steps, values, color=colour, lw=width, marker="o", ms=3, label=label)
        return
    axes.plot(steps, values, color=colour, lw=0.7, alpha=0.25)
    axes.plot(steps, _smooth(values), color=colour, lw=width, label=label)


def _set_loss_scale(axes: Axes) -> None:
    import numpy as np

    points = [float(v) for line in axes.get_lines() for v in np.asarray(line.get_ydata())]
    values = [value for value in points if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    # The hidden-state term is often a hundred times the others.
    if positive and min(values) > 0 and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    elif values and min(values) >= 0:
        axes.set_ylim(bottom=0)


def _smooth(values: Sequence[float]) -> list[float]:
    """Average over about a twentieth of the run, centred, narrower at the ends."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _draw_metrics(axes: Axes, records: list[MetricRecord], names: Sequence[str]) -> None:
    for name, colour in zip(names, _cycle(len(names)), strict=True):
        steps, values = series(records, name)
        label = name.removeprefix(DEV_PREFIX)
        axes.plot(steps, values, color=colour, lw=1.6, marker="o", ms=4, label=label)
    axes.set_ylabel("dev set")
    points = [y for name in names for y in series(records, name)[1] if math.isfinite(y)]
    # Perplexities fall by factors, and stand beside bits per byte.
    if points and min(points) > 0 and max(points) > max(1.0, 20 * min(points)):
        axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _label_cells(axes: Axes, grid: Any, relative: Any, spread: float) -> None:
    for (row, column), share in _cells(grid):
        if math.isnan(share):
            continue
        dark = abs(relative[row, column] - 1.0) > 0.6 * spread
        axes.text(
            column,
            row,
            f"{100 * share:.0f} %",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if dark else INK,
        )


def _cells(grid: Any) -> list[tuple[tuple[int, int], float]]:
    import numpy as np

    return [((row, column), float(share)) for (row, column), share in np.ndenumerate(grid)]


def _ticks(count: int) -> list[int]:
    step = max(1, math.ceil(count / MAX_LABELLED_EXPERTS))
    return list(range(0, count, step))


def short_layer_name(layer: str) -> str:
    """Keep what tells layers apart: `encoder 3`, or just the number where there is no stack.

    Of merged experts also the linear layer, as in `3 out`.
    """
    number = re.search(r"\.(\d+)(?:\.|$)", layer)
    if number is None:
        return layer
    stack = re.search(r"(encoder|decoder)", layer)
    linear = layer.rpartition(".")[2]
    words = [*([stack[1]] if stack else []), number[1]]
    return " ".join(words + ([linear] if linear in ("in", "gate", "out") else []))
