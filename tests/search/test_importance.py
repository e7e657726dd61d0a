"""Importance of keys: what moves the measure is found."""

from __future__ import annotations

import random

from moe_dist.search.importance import key_importance
from moe_dist.search.trials import Report, Trial


def make_trials(count: int) -> list[Trial]:
    chance = random.Random(0)
    trials = []
    for number in range(1, count + 1):
        drawn = {"train.learning_rate": chance.random(), "moe.router": chance.choice(["a", "b"])}
        if chance.random() < 0.5:
            drawn["distill.kl_weight"] = chance.random()
        quality = (drawn["moe.router"] == "a") + 0.05 * float(drawn["train.learning_rate"])
        trials.append(
            Trial(number, drawn, drawn, "finished", [Report(1, 1, {"quality": quality})], 1)
        )
    return trials


def test_what_moves_the_measure_comes_first() -> None:
    shares = key_importance(make_trials(40), "quality")
    assert next(iter(shares)) == "moe.router"
    assert shares["moe.router"] > 0.8
    assert abs(sum(shares.values()) - 1) < 1e-9


def test_few_trials_say_nothing() -> None:
    assert key_importance(make_trials(5), "quality") == {}
    assert key_importance(make_trials(20), "latency") == {}
