"""Near what a strong trial has: within the ranges, and only what can change in flight."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from moe_dist.config import build_config
from moe_dist.config.in_flight import in_flight_keys
from moe_dist.config.search_space import known_paths, parse_space
from moe_dist.search.perturbing import FACTORS, perturb

BASE = {
    "name": "tiny",
    "model": {"teacher": "some/encoder"},
    "data": {"source": "hub", "name": "nyu-mll/glue"},
}


def neighbours(space: dict[str, Any], drawn: dict[str, Any], count: int = 80) -> list[Any]:
    config = build_config({**BASE, "search": {"space": space}})
    dimensions, faults = parse_space(space)
    assert faults == []
    generator = random.Random(0)
    return [perturb(dimensions, config, drawn, generator) for _ in range(count)]


def test_every_key_of_the_table_is_a_key_of_a_recipe_and_in_the_documentation() -> None:
    assert set(in_flight_keys()) <= set(known_paths())
    text = (Path(__file__).parents[2] / "docs/search.md").read_text(encoding="utf-8")
    table = text.partition("| what changes in flight |")[2].partition("\n\n")[0]
    for path in in_flight_keys():
        assert f"`{path}`" in table or f"`{path.removeprefix('distill.')}`" in table


def test_numbers_move_within_their_range_and_what_is_fixed_stays() -> None:
    space = {
        "train.learning_rate": {"loguniform": [1e-5, 1e-3]},
        "distill.kl_weight": {"uniform": [0, 4]},
        "moe.partition": {"choice": ["importance", "random"]},
        "moe.num_experts": {"integers": [2, 8]},
    }
    drawn = {
        "train.learning_rate": 9e-4,
        "distill.kl_weight": 2.0,
        "moe.partition": "random",
        "moe.num_experts": 3,
    }
    found = neighbours(space, drawn)
    assert all(point.drawn == point.overrides for point in found)
    for key in ("moe.partition", "moe.num_experts"):
        assert {point.drawn[key] for point in found} == {drawn[key]}
    rates = [point.drawn["train.learning_rate"] for point in found]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates) and max(rates) == 1e-3
    weights = [point.drawn["distill.kl_weight"] for point in found]
    moved = sum(weight in {2.0 * factor for factor in FACTORS} for weight in weights)
    assert 40 <= moved < 80 and all(0 <= weight <= 4 for weight in weights)


def test_choices_go_to_a_neighbour_and_whole_numbers_stay_on_their_grid() -> None:
    space = {
        "distill.temperature": {"choice": [1.0, 2.0, 4.0, 8.0]},
        "distill.task_weight": {"integers": [10, 30], "step": 5},
    }
    found = neighbours(space, {"distill.temperature": 8.0, "distill.task_weight": 20})
    temperatures = [point.drawn["distill.temperature"] for point in found]
    assert temperatures.count(8.0) + temperatures.count(4.0) >= 60
    assert {point.drawn["distill.task_weight"] for point in found} <= {10, 15, 20, 25, 30}
    assert len({point.drawn["distill.task_weight"] for point in found}) >= 3


def test_conditions_hold_for_what_is_taken_over() -> None:
    space = {
        "moe.router": {"choice": ["hash_random", "token_gate"]},
        "distill.load_balancing_weight": {
            "uniform": [0.01, 0.1],
            "when": {"moe.router": "token_gate"},
            "otherwise": 0,
        },
    }
    gated = neighbours(space, {"moe.router": "token_gate", "distill.load_balancing_weight": 0.05})
    assert all(point.overrides["distill.load_balancing_weight"] >= 0.01 for point in gated)
    hashed = neighbours(space, {"moe.router": "hash_random"})
    assert all(
        point.overrides == {"moe.router": "hash_random", "distill.load_balancing_weight": 0}
        for point in hashed
    )
