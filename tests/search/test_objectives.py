"""Goals, costs and the Pareto front."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe_dist.errors import ConfigError
from moe_dist.search.objectives import check_cost, is_better, pareto_front, parse_goals


def test_goals_are_read_and_met() -> None:
    kept, small = parse_goals("retention >= 99%, parameters<2e7")
    assert (kept.metric, kept.sign, kept.bound) == ("retention", ">=", 0.99)
    assert kept.is_met({"retention": 0.99}) and not kept.is_met({"retention": 0.98})
    assert not kept.is_met({}) and not kept.is_met({"retention": math.nan})
    assert small.is_met({"parameters": 1.9e7}) and not small.is_met({"parameters": 2e7})


def test_goals_that_cannot_be_read_are_named_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_goals("retention=0.99, speed>=2, quality>=1e")
    said = "\n".join(caught.value.faults)
    assert "'retention=0.99' is no bound" in said
    assert "speed is not measured" in said
    assert "'quality>=1e' has no number" in said


def test_a_goal_may_bound_a_perplexity_from_above() -> None:
    (goal,) = parse_goals("perplexity<=40")
    assert goal.is_met({"perplexity": 39.0}) and not goal.is_met({"perplexity": 41.0})


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("perplexity >= 40", "lower is better; write perplexity<=40"),
        ("latency>5", "lower is better; write latency<5"),
        ("retention<99%", "higher is better; write retention>99%"),
    ],
)
def test_a_goal_from_the_wrong_side_is_refused(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_goals(text)
    assert remedy in caught.value.faults[0]


@pytest.mark.parametrize(
    ("text", "mode", "remedy"),
    [
        ("quality>=40", "min", "lower is better, as these data are measured; write quality<=40"),
        ("quality<.9", "max", "higher is better, as these data are measured; write quality>.9"),
    ],
)
def test_quality_is_bounded_from_the_side_of_the_main_metric(
    text: str, mode: Any, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_goals(text, mode)
    assert remedy in caught.value.faults[0]
    # Where nobody has told, the data decide.
    assert parse_goals(text)
    assert parse_goals(text, "min" if mode == "max" else "max")


def test_only_costs_are_minimised() -> None:
    assert check_cost("flops") == "flops"
    with pytest.raises(ConfigError, match="use one of latency, flops"):
        check_cost("quality")
    with pytest.raises(ConfigError, match="perplexity is no cost"):
        check_cost("perplexity")


def test_the_front_holds_what_nothing_beats() -> None:
    rows = [
        {"quality": 0.9, "flops": 10.0},
        {"quality": 0.8, "flops": 5.0},
        {"quality": 0.8, "flops": 6.0},
        {"quality": 0.7, "flops": 4.0},
        {"quality": 0.95},
        {"quality": 0.9, "flops": 10.0},
    ]
    assert pareto_front(rows, {"quality": "max", "flops": "min"}) == [0, 1, 3, 5]


def test_nan_is_worse_than_anything() -> None:
    assert is_better("max", 1.0, math.nan) and not is_better("min", math.nan, 1.0)
    assert is_better("min", 1.0, 2.0) and not is_better("max", 1.0, 2.0)
