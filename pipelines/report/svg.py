"""Small charts as SVG text: nothing to load, sharp at any size, legible on a phone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from rich.cells import cell_len, set_cell_size

from moe_dist.search.objectives import pareto_front

from .plots import short_layer_name

# About a phone's width, so that text is drawn there at its own size.
WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36
GREY = "#b9bec6"
MAX_POINTS = 120
NUM_TICKS = 5
_ROW = 20
# From fewer tokens than an even share (blue) to more (red), white between.
_SHADES = "#2166ac #4393c3 #92c5de #d1e5f0 #ffffff #fddbc7 #f4a582 #d6604d #b2182b #8e0b22".split()
_STEPS = (0.25, 0.5, 0.75, 0.9, 1.1, 1.4, 1.8, 2.5, 3.5)
"""Share divided by the even share at which the next shade begins."""


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: shown by the pointer.
        xs: its x values.
        ys: its y values; those that are no numbers are passed over.
        colour: of the line; empty for one among many.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = ""


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot.

    Attributes:
        name: shown by the pointer, and beside it where it is on the front.
        x: the cost.
        y: the quality.
        colour: empty for one among many.
    """

    name: str
    x: float
    y: float
    colour: str = ""


@dataclass(frozen=True)
class Span:
    """A value with its interval.

    Attributes:
        name: shown in front of it.
        value: the value.
        low: lower end; None without an interval.
        high: upper end.
        colour: empty for one among many.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = ""


def line_chart(lines: Sequence[Line], *, x_label: str, logarithmic: bool = False) -> Markup:
    """Draw curves, the coloured ones above the others; empty if there are none.

    On a logarithmic y axis all values must be above 0.
    """
    kept = [(line, _thinned(line)) for line in lines]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return Markup("")
    axes = _Axes(
        [x for _, points in kept for x, _ in points],
        [y for _, points in kept for _, y in points],
        logarithmic=logarithmic,
    )
    parts = [axes.frame(x_label)]
    for line, points in sorted(kept, key=lambda entry: bool(entry[0].colour)):
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
        style = f'stroke="{line.colour or GREY}" stroke-width="{1.8 if line.colour else 0.8}"'
        if len(points) == 1:
            x, y = points[0]
            parts.append(_circle(axes.x(x), axes.y(y), 3, line.colour or GREY, line.name))
        else:
            parts.append(
                f'<polyline fill="none" {style} points="{path}"><title>{escape(line.name)}</title>'
                "</polyline>"
            )
    return _svg(parts)


def scatter(dots: Sequence[Dot], *, x_label: str, higher_is_better: bool) -> Markup:
    """Draw quality against cost, and the front of those that none beats in both; empty if none."""
    if not dots:
        return Markup("")
    axes = _Axes([dot.x for dot in dots], [dot.y for dot in dots])
    parts = [axes.frame(x_label)]
    front = front_of(dots, higher_is_better=higher_is_better)
    if len(front) > 1:
        path = " ".join(f"{axes.x(dot.x):.1f},{axes.y(dot.y):.1f}" for dot in front)
        parts.append(
            f'<polyline fill="none" stroke="#555" stroke-dasharray="3 3" points="{path}"/>'
        )
    for dot in sorted(dots, key=lambda dot: bool(dot.colour)):
        title = f"{dot.name}: {dot.y:.4g} at {tick(dot.x)}"
        parts.append(_circle(axes.x(dot.x), axes.y(dot.y), 5, dot.colour or GREY, title))
    for dot in front:
        x, y = axes.x(dot.x), axes.y(dot.y)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="#222"/>')
    return _svg(parts)


def front_of(dots: Sequence[Dot], *, higher_is_better: bool) -> list[Dot]:
    """Find the points that none is as cheap as and better than, cheapest first."""
    rows = [{"quality": dot.y, "cost": dot.x} for dot in dots]
    front = pareto_front(rows, {"quality": "max" if higher_is_better else "min", "cost": "min"})
    return sorted((dots[index] for index in front), key=lambda dot: dot.x)


def spans(rows: Sequence[Span], *, reference: float | None = None) -> Markup:
    """Draw values with their intervals, top to bottom, and a line at `reference`; empty if none."""
    if not rows:
        return Markup("")
    ends = [end for row in rows for end in (row.low, row.high, row.value) if end is not None]
    ends += [] if reference is None else [reference]
    height = BOTTOM + 2 * _ROW * len(rows)
    axes = _Axes(ends, [0.0, 1.0], left=8, height=height)
    parts = [axes.bottom("")]
    for index, row in enumerate(rows):
        base = 2 * _ROW * index
        colour = row.colour or "#7a828e"
        if reference is not None:
            x = axes.x(reference)
            # Not through the text above.
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base + 20}" y2="{base + 38}" '
                'stroke="#555" stroke-dasharray="3 3"/>'
            )
        text = f"{row.value:.3f}"
        if row.low is not None and row.high is not None:
            text += f"  [{row.low:.3f}, {row.high:.3f}]"
            parts.append(
                f'<line x1="{axes.x(row.low):.1f}" x2="{axes.x(row.high):.1f}" y1="{base + 28}" '
                f'y2="{base + 28}" stroke="{colour}" stroke-width="2.5"/>'
            )
        parts.append(_circle(axes.x(row.value), base + 28, 4.5, colour, row.name))
        parts.append(f'<text x="8" y="{base + 15}">{escape(_cut(row.name, 32))}</text>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{base + 15}" class="e">{text}</text>')
    return _svg(parts, height=height)


def heat_map(loads: Mapping[str, Sequence[float]]) -> Markup:
    """Draw which experts of which layer are busy, from each one's share of the layer's tokens.

    A row for each layer, white at an even share, red above, blue below.
    """
    num_experts = max((len(shares) for shares in loads.values()), default=0)
    if num_experts == 0:
        return Markup("")
    left = 62
    width = (WIDTH - left - RIGHT) / num_experts
    row_height = 16
    cells: dict[str, list[str]] = {}
    parts = []
    for row, (layer, shares) in enumerate(loads.items()):
        name = escape(_cut(short_layer_name(layer), 10))
        parts.append(f'<text x="{left - 6}" y="{row * row_height + 12}" class="e">{name}</text>')
        for column, share in enumerate(shares):
            colour = shade(share * len(shares))
            x = left + column * width
            cells.setdefault(colour, []).append(
                f"M{x:.1f} {row * row_height}h{width - 1:.1f}v{row_height - 1}h{1 - width:.1f}z"
            )
    # One path for each shade: thousands of cells stay small.
    drawn = [f'<path fill="{colour}" d="{"".join(d)}"/>' for colour, d in cells.items()]
    height = row_height * len(loads) + 18
    num_rows = row_height * len(loads)
    frame = (
        f'<rect x="{left - 1}" y="-1" width="{WIDTH - left - RIGHT + 1:.1f}" '
        f'height="{num_rows + 1}" fill="#dcdfe4"/>'
    )
    label = f'<text x="{left}" y="{num_rows + 14}">expert 0 … {num_experts - 1}</text>'
    return _svg([frame, *drawn, *parts, label], height=height)


def shade(relative: float) -> str:
    """Choose the colour of share divided by even share: white from 0.9 to 1.1."""
    return _SHADES[sum(relative >= step for step in _STEPS)]


class _Axes:
    """Scales and their labels."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        logarithmic: bool = False,
        left: int = LEFT,
        height: int = HEIGHT,
    ) -> None:
        self._log = logarithmic
        self._left = left
        self._height = height
        self._xs = _widened(min(xs), max(xs))
        low, high = min(ys), max(ys)
        self._ys = _widened(*((math.log10(low), math.log10(high)) if logarithmic else (low, high)))

    def x(self, value: float) -> float:
        low, high = self._xs
        return self._left + (value - low) / (high - low) * (WIDTH - self._left - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._ys
        scaled = math.log10(value) if self._log else value
        return self._height - BOTTOM - (scaled - low) / (high - low) * (self._height - TOP - BOTTOM)

    def frame(self, x_label: str) -> str:
        parts = [self.bottom(x_label)]
        chosen = self._y_ticks()
        step = _step(chosen)
        for value in chosen:
            y = self.y(value)
            parts.append(
                f'<line x1="{self._left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                f'class="g"/><text x="{self._left - 5}" y="{y + 4:.1f}" class="e">'
                f"{tick(value, step)}</text>"
            )
        return "".join(parts)

    def bottom(self, x_label: str) -> str:
        floor = self._height - BOTTOM
        parts = [
            f'<line x1="{self._left}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}" class="a"/>'
        ]
        chosen = ticks(*self._xs)
        step = _step(chosen)
        for value in chosen:
            x = self.x(value)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}" class="a"/>'
                f'<text x="{x:.1f}" y="{floor + 16}" class="m">{tick(value, step)}</text>'
            )
        if x_label:
            middle = (self._left + WIDTH - RIGHT) / 2
            parts.append(
                f'<text x="{middle:.0f}" y="{self._height - 4}" class="m">{escape(x_label)}</text>'
            )
        return "".join(parts)

    def _y_ticks(self) -> list[float]:
        low, high = self._ys
        if not self._log:
            return ticks(low, high)
        decades = range(math.floor(low), math.ceil(high) + 1)
        chosen = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        inside = [value for value in chosen if low <= math.log10(value) <= high]
        return inside if len(inside) <= 2 * NUM_TICKS else inside[::3]


def ticks(low: float, high: float) -> list[float]:
    """Choose about five values in a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick(value: float, step: float = math.inf) -> str:
    """Write a value at an axis, with k, M or G, so that the next `step` does not read the same."""
    near = abs(value) / step if step > 0 else 0.0
    digits = max(4, math.ceil(math.log10(near)) + 1) if near > 0 else 4
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{prefix}"
    return f"{0.0 if abs(value) < 1e-12 else value:.{digits}g}"


def _step(values: Sequence[float]) -> float:
    """The smallest distance of neighbours."""
    return min((b - a for a, b in itertools.pairwise(values)), default=math.inf)


def _widened(low: float, high: float) -> tuple[float, float]:
    """Leave some room around the values, and more where there is only one."""
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _thinned(line: Line) -> list[tuple[float, float]]:
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(x + y)]
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    # The last value is the one that people look for.
    return points[:-1:step] + points[-1:]


def _circle(x: float, y: float, radius: float, colour: str, title: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _svg(parts: Sequence[str], *, height: int = HEIGHT) -> Markup:
    # Text from outside has been escaped where it was put in.
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{body}</svg>')


def _cut(text: str, length: int) -> str:
    """Shorten a text to so many columns; wide characters take two."""
    if cell_len(text) <= length:
        return text
    return set_cell_size(text, length - 1).rstrip() + "…"
