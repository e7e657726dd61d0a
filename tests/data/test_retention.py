from __future__ import annotations

import math

import pytest

from moe_dist.data.retention import ratio, ratio_interval, why_no_ratio


@pytest.mark.parametrize(
    ("value", "whole", "higher", "kept", "why"),
    [
        (0.8, 0.9, True, 0.8 / 0.9, None),
        (0.0, 0.9, True, 0.0, None),
        (-0.2, 0.5, True, -0.4, None),
        (-0.19, -0.2, True, None, "the teacher's metric is -0.2"),
        (0.5, 0.0, True, None, "the teacher's metric is 0"),
        (0.5, math.nan, True, None, "the teacher's metric is undefined"),
        (None, 0.5, True, None, "the student's metric is undefined"),
        (40.0, 20.0, False, 0.5, None),
        (16.0, 20.0, False, 1.25, None),
        (0.0, 20.0, False, None, "the student's metric is 0, and nothing can be divided by it"),
        (20.0, 0.0, False, None, "the teacher's metric is 0"),
        (math.nan, 20.0, False, None, "the student's metric is undefined"),
    ],
)
def test_there_is_a_retention_only_of_a_teacher_above_chance(
    value: float | None, whole: float | None, higher: bool, kept: float | None, why: str | None
) -> None:
    found = ratio(value, whole, higher_is_better=higher)
    assert found == (None if kept is None else pytest.approx(kept))
    said = why_no_ratio(value, whole, higher_is_better=higher)
    assert said is None if why is None else said is not None and said.startswith(why)


@pytest.mark.parametrize(
    ("low", "high", "whole", "higher", "expected"),
    [
        (-0.1, 0.05, 0.5, True, (0.8, 1.1)),
        (5.0, 20.0, 20.0, False, (0.5, 0.8)),
        (-4.0, 5.0, 20.0, False, (0.8, 1.25)),
        (-0.1, 0.1, 0.0, True, None),
        (-20.0, 5.0, 20.0, False, None),
        (0.0, 1.0, None, True, None),
    ],
)
def test_an_interval_of_differences_becomes_one_of_retention(
    low: float, high: float, whole: float | None, higher: bool, expected: tuple[float, float] | None
) -> None:
    found = ratio_interval(low, high, whole, higher_is_better=higher)
    assert found == (None if expected is None else pytest.approx(expected))
