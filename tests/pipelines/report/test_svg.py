"""Charts: what is drawn where, and what cannot be drawn."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from pipelines.report.svg import (
    Dot,
    Line,
    Span,
    front_of,
    heat_map,
    line_chart,
    scatter,
    shade,
    spans,
    tick,
    ticks,
)


def test_the_front_holds_what_none_beats_in_both() -> None:
    dots = [
        Dot("a", 1, 0.8),
        Dot("b", 2, 0.7),
        Dot("c", 3, 0.9),
        Dot("d", 1, 0.6),
        Dot("e", 4, 0.9),
    ]
    assert [dot.name for dot in front_of(dots, higher_is_better=True)] == ["a", "c"]
    # As perplexities: nothing is lower than the cheapest ones.
    assert [dot.name for dot in front_of(dots, higher_is_better=False)] == ["d"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.93, 1.01, [0.94, 0.96, 0.98, 1.0])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_values_at_axes_are_short() -> None:
    assert [tick(value) for value in (11_200_000, 0.1 + 0.2, 0, 1500)] == [
        "11.2M",
        "0.3",
        "0",
        "1.5k",
    ]


def test_neighbours_at_an_axis_read_differently() -> None:
    values = ticks(11_065_000.0, 11_066_000.0)
    texts = [tick(value, values[1] - values[0]) for value in values]
    assert texts == ["11.065M", "11.0652M", "11.0654M", "11.0656M", "11.0658M", "11.066M"]
    dots = [Dot(name, x, 0.8, "#000") for name, x in (("a", 11_065_000.0), ("b", 11_066_000.0))]
    assert ">11.0655M<" in scatter(dots, x_label="FLOPs", higher_is_better=True)


def test_loads_are_coloured_by_their_distance_from_an_even_share() -> None:
    assert shade(1.0) == "#ffffff"
    assert shade(0.0) != shade(0.6) != shade(1.0) != shade(1.6) != shade(4.0)


def test_every_chart_is_whole_xml_and_keeps_foreign_text_out() -> None:
    name = '<script>"&'
    charts = [
        line_chart([Line(name, [1, 2, 3], [1.0, float("nan"), 0.001], "#000")], x_label=name),
        line_chart([Line(name, [1, 2], [1.0, 0.001])], x_label="x", logarithmic=True),
        line_chart([Line(name, [5], [1.0])], x_label="x"),
        scatter(
            [Dot(name, 1.0, 2.0), Dot(name, 2.0, 3.0, "#000")], x_label=name, higher_is_better=True
        ),
        spans([Span(name, 0.9, 0.8, 1.0), Span(name, 0.9)], reference=1.0),
        heat_map({name: [0.9, 0.1]}),
    ]
    for chart in charts:
        ElementTree.fromstring(str(chart))
        assert "<script" not in chart and "nan" not in chart


def test_nothing_to_draw_is_nothing() -> None:
    empty = [
        line_chart([], x_label=""),
        scatter([], x_label="", higher_is_better=True),
        spans([]),
        heat_map({}),
    ]
    assert empty == [""] * 4
    assert line_chart([Line("a", [1], [float("nan")])], x_label="") == ""


def test_long_curves_keep_their_last_point() -> None:
    chart = line_chart(
        [Line("a", list(range(10_000)), [0.0] * 9_999 + [1.0], "#000")], x_label="step"
    )
    found = re.search(r'<polyline[^>]*points="([^"]*)"', chart)
    assert found is not None
    points = found[1].split()
    assert len(points) <= 130
    assert float(points[-1].split(",")[1]) < float(points[0].split(",")[1])
