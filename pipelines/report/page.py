"""One HTML page that compares runs: nothing is loaded from elsewhere, so that it can be sent."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moe_dist.redaction import hide_secrets

from ..console import duration, quantity
from .documents import shown
from .plots import COLOURS
from .run_summary import ModelView, RunView, quality
from .svg import Dot, Line, Span, heat_map, line_chart, scatter, spans

TEMPLATE = "page.html"
MAX_SPANS = 60
MAX_HEAT_MAPS = 24


@dataclass(frozen=True)
class Figure:
    """A chart with its heading.

    Attributes:
        title: the heading.
        drawing: an `svg` element.
    """

    title: str
    drawing: Markup


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        key: what it is sorted by.
    """

    text: str
    key: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        name: the run, or a student of it.
        colour: that of the run in the charts; empty for one among many.
        cells: one for each column.
    """

    name: str
    colour: str
    cells: Sequence[Cell]


def render_page(views: Sequence[RunView], title: str = "Runs compared") -> str:
    """Write the HTML page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    views = sorted(views, key=_rank)
    colours = {view.name: colour for view, colour in zip(views, COLOURS, strict=False)}
    columns, rows = result_rows(views, colours)
    differing = differing_params(views)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csp_source"] = csp_source
    with_loads = [view for view in views if view.loads]
    page = environment.get_template(TEMPLATE).render(
        title=title,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        num_runs=len(views),
        verdict=_verdict(views),
        differing=differing,
        setting_rows=[
            TableRow(
                view.name,
                colours.get(view.name, ""),
                [_cell(view.params.get(key, "")) for key in differing],
            )
            for view in views
        ],
        same=_same_params(views),
        columns=columns,
        result_rows=rows,
        retention=_retention_figure(views, colours),
        max_spans=MAX_SPANS,
        costs=cost_figures(views, colours),
        curves=curve_figures(views, colours),
        loads=[
            Figure(f"{view.name} · {model}", heat_map(by_layer))
            for view in with_loads[:MAX_HEAT_MAPS]
            for model, by_layer in view.loads.items()
        ],
        num_without_heat_map=max(0, len(with_loads) - MAX_HEAT_MAPS),
        num_coloured=min(len(views), len(COLOURS)),
    )
    return shown(hide_secrets(page), kept="\n")


def csp_source(script: str) -> str:
    """Name a script in a content security policy, so that the browser runs no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def differing_params(views: Sequence[RunView]) -> list[str]:
    """List the settings, as dotted names, in which the runs differ."""
    names = dict.fromkeys(key for view in views for key in view.params)
    return [key for key in names if len({view.params.get(key) for view in views}) > 1]


def _same_params(views: Sequence[RunView]) -> dict[str, str]:
    if not views:
        return {}
    differing = set(differing_params(views))
    return {key: text for key, text in views[0].params.items() if key not in differing}


def result_rows(
    views: Sequence[RunView], colours: Mapping[str, str]
) -> tuple[list[str], list[TableRow]]:
    """Lay out headings and a row for each student; for a run without results its state."""
    sizes = list(dict.fromkeys(size for view in views for size in _sizes(view)))
    metrics = {view.metric_title for view in views if view.metric_title}
    name = metrics.pop() if len(metrics) == 1 else ""
    if name and not all(view.higher_is_better for view in views if view.metric_title):
        heading = f"{name} (lower is better)"
    else:
        heading = name or "quality"
    columns = ["state", heading, "teacher", "retention", "interval", "worst imbalance"]
    columns += ["active", "FLOPs/token", *(f"ms, batch {size}" for size in sizes), "time"]
    rows = []
    for view in views:
        for model in view.models or (ModelView("", {}),):
            entry = model.entry
            value, base = quality(entry, view.main_metric), quality(view.teacher, view.main_metric)
            # Where runs have several main metrics, each value says its own.
            suffix = "" if name else f" {view.metric_title}"
            cells = [
                Cell(view.status.lower()),
                _number(value, partial(_with_suffix, suffix=suffix)),
                _number(base, lambda v: f"{v:.4f}"),
                _number(model.retention, lambda v: f"{v:.4f}"),
                Cell("" if model.interval is None else "{:.3f} to {:.3f}".format(*model.interval)),
                _number(_worst_imbalance(view, model.label), lambda v: f"{v:.2f}"),
                _number(entry.get("parameters", {}).get("active"), quantity),
                _number(entry.get("flops_per_token"), quantity),
                *(_number(_latencies(entry).get(size), lambda v: f"{v:.1f}") for size in sizes),
                _number(sum(view.seconds.values()) or None, duration),
            ]
            rows.append(TableRow(_model_name(view, model), colours.get(view.name, ""), cells))
    return columns, rows


def cost_figures(views: Sequence[RunView], colours: Mapping[str, str]) -> list[Figure]:
    """Draw quality against FLOPs and the latency at each batch size, with the Pareto front.

    Runs whose metrics are better in opposite directions have charts of their own.
    """
    sizes = list(dict.fromkeys(size for view in views for size in _sizes(view)))
    costs: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "FLOPs per token": lambda entry: entry.get("flops_per_token")
    }
    for size in sizes:
        costs[f"ms for a batch of {size}"] = partial(_latency, size=size)
    figures = []
    measured = [view for view in views if view.main_metric]
    directions = sorted({view.higher_is_better for view in measured}, reverse=True)
    for label, cost in costs.items():
        for higher in directions:
            dots = []
            for view in (one for one in measured if one.higher_is_better == higher):
                for name, entry, colour in _priced(view, colours):
                    value, x = quality(entry, view.main_metric), cost(entry)
                    if value is not None and x is not None:
                        dots.append(Dot(name, float(x), value, colour))
            title = label if higher else f"{label} (lower is better)"
            drawing = scatter(dots, x_label=label, higher_is_better=higher)
            figures.append(Figure(title, drawing))
    return [figure for figure in figures if figure.drawing]


def curve_figures(views: Sequence[RunView], colours: Mapping[str, str]) -> list[Figure]:
    """Draw the learning curves of the main students, or of all where there is one run.

    A chart for each dev metric, loss term and the worst imbalance.
    """
    lines: dict[str, list[Line]] = {}
    for view in views:
        for position, (label, curves) in enumerate(view.curves.items()):
            if label and len(views) > 1:
                continue
            colour = colours.get(view.name, "")
            if len(views) == 1:
                colour = COLOURS[position % len(COLOURS)]
            name = f"{view.name} · {label}" if label else view.name
            for metric, (steps, values) in curves.items():
                lines.setdefault(metric, []).append(Line(name, steps, values, colour))
    ordered = sorted(
        lines, key=lambda name: (not name.startswith(("dev/", "holdout/")), "total" not in name)
    )
    figures = []
    for metric in ordered:
        values = [y for line in lines[metric] for y in line.ys if math.isfinite(y)]
        wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
        drawing = line_chart(lines[metric], x_label="optimizer step", logarithmic=wide)
        figures.append(Figure(curve_title(metric), drawing))
    return [figure for figure in figures if figure.drawing]


def curve_title(metric: str) -> str:
    """Say what a learning curve shows, for example `loss: hidden mse`."""
    kind, _, name = metric.removeprefix("train/").rpartition("/")
    return f"{kind}: {name.replace('_', ' ')}"


def _retention_figure(views: Sequence[RunView], colours: Mapping[str, str]) -> Markup:
    rows = []
    for view in views:
        for model in view.models:
            if model.retention is not None:
                low, high = model.interval or (None, None)
                name, colour = _model_name(view, model), colours.get(view.name, "")
                rows.append(Span(name, model.retention, low, high, colour))
    return spans(rows[:MAX_SPANS], reference=1.0)


def _priced(view: RunView, colours: Mapping[str, str]) -> list[tuple[str, Mapping[str, Any], str]]:
    colour = colours.get(view.name, "")
    found = [(_model_name(view, model), model.entry, colour) for model in view.models]
    if view.teacher:
        found.append((f"{view.name} · teacher", view.teacher, "#222222"))
    return found


def _verdict(views: Sequence[RunView]) -> str:
    """Say which run is best, and whether the dev rows can tell."""
    measured = [view for view in views if view.quality is not None]
    if not measured:
        return "None of these runs has been evaluated yet."
    if len({view.metric_title for view in measured}) > 1:
        return "The runs are measured by different metrics; compare their retentions."
    best = min(measured, key=_rank)
    model = best.models[0]
    extreme = "highest" if best.higher_is_better else "lowest"
    text = f"{best.name} has the {extreme} {best.metric_title}: {best.quality:.4f}"
    if model.retention is not None and best.higher_is_better:
        text += f", {100 * model.retention:.1f} % of its teacher's"
    elif model.retention is not None:
        text += f", retention {model.retention:.3f}"
    base = quality(best.teacher, best.main_metric)
    if model.interval is None or base is None or len(measured) == 1:
        return f"{text}."
    low = model.interval[0]
    end = low * base if best.higher_is_better else base / low
    word = "begins" if best.higher_is_better else "ends"
    rivals = [
        view
        for view in measured
        if view is not best and view.quality is not None and _reaches(view, view.quality, end)
    ]
    if not rivals:
        return f"{text}; no other run reaches its interval, which {word} at {end:.4f}."
    others = "another run reaches" if len(rivals) == 1 else f"{len(rivals)} other runs reach"
    return f"{text}. But {others} its interval, which {word} at {end:.4f}: no clear winner."


def _reaches(view: RunView, value: float, end: float) -> bool:
    return value >= end if view.higher_is_better else value <= end


def _rank(view: RunView) -> tuple[float, str]:
    if view.quality is None:
        return math.inf, view.name
    return -view.quality if view.higher_is_better else view.quality, view.name


def _worst_imbalance(view: RunView, label: str) -> float | None:
    loads = view.loads.get(label or "student", {})
    values = [max(shares) * len(shares) for shares in loads.values() if shares]
    return max(values, default=None)


def _sizes(view: RunView) -> list[str]:
    """List the batch sizes that a run timed."""
    entries = [view.teacher, *(model.entry for model in view.models)]
    return [size for entry in entries for size in _latencies(entry)]


def _latencies(entry: Mapping[str, Any]) -> Mapping[str, float]:
    found: Mapping[str, float] = entry.get("latency_ms", {})
    return found


def _latency(entry: Mapping[str, Any], size: str) -> float | None:
    return _latencies(entry).get(size)


def _with_suffix(value: float, suffix: str) -> str:
    return f"{value:.4f}{suffix}"


def _model_name(view: RunView, model: ModelView) -> str:
    return f"{view.name} · {model.label}" if model.label else view.name


def _number(value: float | None, write: Callable[[float], str]) -> Cell:
    return Cell("") if value is None else Cell(write(value), repr(float(value)))


def _cell(text: str) -> Cell:
    try:
        return Cell(text, repr(float(text)))
    except ValueError:
        return Cell(text, text)
