from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from ray.tune.schedulers import TrialScheduler

from moe_dist.search.early_stopping import OBJECTIVE, TIME, Ruling, build_scheduler, ruled_value
from moe_dist.search.trials import Report, Trial


@dataclass(frozen=True)
class Running:
    trial_id: str


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_trial_whose_measure_is_undefined_is_ended_as_the_worst(
    scheduler: str, mode: str
) -> None:
    ruling = Ruling(scheduler, "matthews", mode, last_rung=9, reduction_factor=3)
    past = [Trial(number, reports=[Report(1, 10, {"matthews": 0.3})]) for number in range(8)]
    judge = build_scheduler(ruling, past)
    assert judge is not None
    said = {}
    for name, metrics in (("bad", {"matthews": math.nan}), ("none", {}), ("ok", {"matthews": 0.3})):
        trial = Running(name)
        judge.on_trial_add(None, trial)
        result = {TIME: 1, OBJECTIVE: ruled_value(metrics, ruling)}
        said[name] = judge.on_trial_result(None, trial, result)
    assert said == {
        "bad": TrialScheduler.STOP,
        "none": TrialScheduler.STOP,
        "ok": TrialScheduler.CONTINUE,
    }


def test_an_undefined_measure_is_worse_than_the_largest_perplexity() -> None:
    ruling = Ruling("asha", "word_perplexity", "min", last_rung=9, reduction_factor=3)
    huge = ruled_value({"word_perplexity": 1e12}, ruling)
    assert huge == 1e12 < ruled_value({"word_perplexity": math.nan}, ruling)


def test_an_undefined_measure_of_the_past_does_not_raise_the_bar() -> None:
    ruling = Ruling("asha", "matthews", "max", last_rung=9, reduction_factor=3)
    past = [Trial(number, reports=[Report(1, 10, {})]) for number in range(8)]
    judge = build_scheduler(ruling, past)
    assert judge is not None
    trial = Running("first")
    judge.on_trial_add(None, trial)
    assert judge.on_trial_result(None, trial, {TIME: 1, OBJECTIVE: -0.1}) == TrialScheduler.CONTINUE
