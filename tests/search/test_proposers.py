"""Who proposes points: the same again after an interruption, and learning from what was found."""

from __future__ import annotations

from typing import Any

import pytest

from moe_dist.config import RunConfig, build_config
from moe_dist.config.search_space import Point, parse_space
from moe_dist.search.proposers import build_proposer
from moe_dist.search.trials import Report, Trial

BASE = {
    "name": "tiny",
    "model": {"teacher": "some/encoder"},
    "data": {"source": "hub", "name": "nyu-mll/glue"},
}
SPACE = {
    "moe.partition": {"choice": ["importance", "random"]},
    "moe.tie_shared": {"choice": [True, False], "when": {"moe.partition": "importance"}},
    "distill.kl_weight": {"uniform": [0, 10]},
}


def build(space: dict[str, Any] = SPACE, **search: Any) -> tuple[Any, RunConfig]:
    config = build_config({**BASE, "search": {"space": space, **search}})
    return parse_space(config.search.space)[0], config


def judged(number: int, point: Point) -> Trial:
    """A trial whose quality falls with the distance of kl_weight from 7."""
    quality = 1.0 - abs(point.overrides["distill.kl_weight"] - 7.0) / 10
    report = Report(1, 1, {"quality": quality, "flops": 1.0})
    return Trial(number, point.drawn, point.overrides, "finished", [report], 1)


def test_chance_draws_by_number() -> None:
    first, again = (build_proposer(*build(algorithm="random")) for _ in range(2))
    expected = [first.propose(number) for number in range(1, 6)]
    assert again.propose(4) == expected[3]
    assert len({str(point) for point in expected}) == 5


def test_points_that_do_not_fit_are_drawn_again() -> None:
    def fits(point: Point) -> bool:
        return point.overrides["moe.partition"] == "random"

    for algorithm in ("random", "tpe"):
        proposer = build_proposer(*build(algorithm=algorithm), fits)
        drawn = [proposer.propose(number) for number in range(1, 12)]
        assert all(point is not None and fits(point) for point in drawn)
    nothing = build_proposer(*build(algorithm="tpe"), lambda point: False)
    assert nothing.propose(1) is None


def test_a_grid_ends() -> None:
    space = {key: SPACE[key] for key in ("moe.partition", "moe.tie_shared")}
    proposer = build_proposer(*build(space, algorithm="grid"))
    drawn = [proposer.propose(number) for number in range(1, 5)]
    assert [point is None for point in drawn] == [False, False, False, True]


@pytest.mark.parametrize("objectives", [{}, {"quality": "max", "flops": "min"}])
def test_tpe_closes_in_on_what_is_good(objectives: dict[str, str]) -> None:
    proposer = build_proposer(*build(num_trials=40, objectives=objectives))
    drawn = []
    for number in range(1, 41):
        point = proposer.propose(number)
        assert point is not None
        drawn.append(point.overrides["distill.kl_weight"])
        proposer.tell(judged(number, point))
    late = [abs(value - 7) for value in drawn[20:]]
    assert sum(late) / len(late) < 2.0


def test_tpe_is_told_of_an_interrupted_sweep() -> None:
    dimensions, config = build(num_trials=40)
    past = []
    first = build_proposer(dimensions, config)
    for number in range(1, 25):
        point = first.propose(number)
        assert point is not None
        past.append(judged(number, point))
    proposer = build_proposer(dimensions, config, past=[Trial(0, status="finished"), *past])
    later = []
    for number in range(25, 37):
        point = proposer.propose(number)
        assert point is not None
        later.append(abs(point.overrides["distill.kl_weight"] - 7))
        proposer.tell(judged(number, point))
    assert sum(later) / len(later) < 2.0


def test_a_trial_without_a_value_does_no_harm() -> None:
    proposer = build_proposer(*build())
    for number in range(1, 8):
        point = proposer.propose(number)
        assert point is not None
        proposer.tell(Trial(number, point.drawn, point.overrides, "failed", message="no memory"))
    assert proposer.propose(8) is not None
