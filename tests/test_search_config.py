"""The search section of a recipe: what is refused, conditions, tables, and drawing points."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest

from moe_dist.config import MoeConfig, RunConfig, build_config
from moe_dist.config.search_checks import changes_teacher, point_settings
from moe_dist.config.search_space import (
    TABLES,
    grid_points,
    parse_space,
    random_draw,
    sample_point,
    table_values,
)
from moe_dist.errors import ConfigError

BASE = {
    "name": "tiny",
    "model": {"teacher": "some/encoder"},
    "data": {"source": "hub", "name": "nyu-mll/glue"},
}


def build(space: dict[str, Any], **search: Any) -> RunConfig:
    return build_config({**BASE, "search": {"space": space, **search}})


def faults(space: dict[str, Any], **search: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(space, **search)
    return "\n".join(caught.value.faults)


def points(config: RunConfig, count: int = 60) -> list[dict[str, Any]]:
    dimensions, wrong = parse_space(config.search.space)
    assert wrong == []
    draw = random_draw(random.Random(0))
    return [sample_point(dimensions, config, draw).overrides for _ in range(count)]


def test_all_faults_of_a_space_come_at_once() -> None:
    found = faults(
        {
            "moe.routr": {"choice": [1]},
            "moe.router": {"choice": ["token_gat"]},
            "train.learning_rate": {"loguniform": [0, 1]},
            "name": {"choice": ["other"]},
            "moe.num_experts": 3,
            "distill.kl_weight": {"uniform": [0, 1], "choice": [2]},
            "distill.task_weight": {"uniform": [2, 1]},
            "distill.temperature": {"uniform": [0, 2]},
            "moe.partition": {"from": "routers"},
            "moe.tie_shared": {"choice": [True], "when": {"moe.foo": 1}},
            "moe.top_k": {"integers": [1, 2], "setp": 2},
        },
        metric="qualty",
    )
    for expected in (
        "moe.routr: is an unknown key. Did you mean moe.router?",
        "moe.router=token_gat is not a choice",
        "Did you mean token_gate?",
        "loguniform=[0, 1] has no logarithm at 0",
        "search.space.name: cannot be searched",
        "moe.num_experts: is not a mapping",
        "has choice and uniform",
        "uniform=[2, 1] has no room",
        "distill.temperature=0 is not greater than 0",
        "from=routers holds values of moe.router",
        "when names moe.foo",
        "has the unknown key 'setp'",
        "qualty is not measured",
    ):
        assert expected in found
    assert "Did you mean quality?" in found


def test_a_point_that_is_no_valid_recipe_is_shown() -> None:
    found = faults({"moe.num_shared_neurons": {"choice": [0, 4000]}})
    assert "at moe.num_shared_neurons=4000" in found
    assert "is more than moe.expert_size=768" in found


def test_trials_take_steps() -> None:
    assert "a trial of 0 epochs trains no student" in faults(
        {"train.num_epochs": {"choice": [0, 1]}}
    )
    with pytest.raises(ConfigError, match="a search has nothing to compare"):
        build_config(
            {
                **BASE,
                "train": {"num_epochs": 0},
                "finetune": {"num_epochs": 0},
                "search": {"space": {"seed": {"choice": [0, 1]}}},
            }
        )


def test_a_recipe_s_own_fault_is_not_said_of_every_point() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(
            {**BASE, "moe": {"top_k": 9}, "search": {"space": {"seed": {"choice": [0, 1]}}}}
        )
    assert len(caught.value.faults) == 1


def test_conditions_follow_other_keys() -> None:
    config = build(
        {
            "moe.num_shared_neurons": {
                "choice": [0, 0.5],
                "of": "moe.expert_size",
                "when": {"moe.partition": "importance"},
                "otherwise": 0,
            },
            "moe.partition": {"from": "partitions"},
            "moe.expert_size": {"choice": [100, 200]},
            "distill.load_balancing_weight": {
                "uniform": [0.1, 0.2],
                "when": {"moe.router": {"not": ["hash_random", "hash_balanced"]}},
            },
            "moe.router": {"from": "routers"},
        }
    )
    drawn = points(config)
    for point in drawn:
        shared = point["moe.num_shared_neurons"]
        if point["moe.partition"] == "importance":
            assert shared in (0, point["moe.expert_size"] // 2)
        else:
            assert shared == 0
        has_gate = not point["moe.router"].startswith("hash_")
        assert ("distill.load_balancing_weight" in point) is has_gate
    assert {point["moe.partition"] for point in drawn} == set(table_values("partitions"))


def test_a_condition_that_can_never_hold_is_refused() -> None:
    when = {"moe.partition": "importanse", "moe.num_experts": {"not": [0]}, "moe.tie_shared": 1}
    found = faults({"distill.kl_weight": {"choice": [1, 2], "when": when}})
    said = "search.space.distill.kl_weight: when asks for what cannot be: "
    assert f"{said}moe.partition=importanse is not a choice" in found
    assert "Did you mean importance?" in found
    assert f"{said}moe.num_experts=0 is not at least 1" in found
    assert f"{said}moe.tie_shared=1 is not" in found


def test_factors_need_two_numbers() -> None:
    found = faults(
        {
            "moe.router": {"choice": ["hash_random"], "of": "moe.expert_size"},
            "train.max_steps": {"choice": [0.5], "of": "finetune.max_steps"},
            "moe.top_k": {"choice": [1], "of": "moe.partition"},
        }
    )
    assert "moe.router: `of` makes its values factors, and 'hash_random' is no number" in found
    assert "of=finetune.max_steps may be None, which is no number" in found
    assert "of=moe.partition may be 'importance', which is no number" in found


def test_only_shares_of_counts_are_rounded() -> None:
    config = build(
        {
            "moe.num_shared_neurons": {"choice": [0.33], "of": "moe.expert_size"},
            "distill.kl_weight": {"choice": [0.3], "of": "distill.task_weight"},
            "distill.task_weight": {"choice": [0.5]},
        }
    )
    assert points(config, 1) == [
        {
            "moe.num_shared_neurons": 253,
            "distill.kl_weight": 0.15,
            "distill.task_weight": 0.5,
        }
    ]


def test_ranges_are_kept() -> None:
    config = build(
        {
            "train.learning_rate": {"loguniform": [1e-5, 1e-3]},
            "distill.kl_weight": {"uniform": [1, 2]},
            "moe.importance_samples": {"integers": [10, 17], "step": 4},
            "train.batch_size": {"integers": [8, 64], "log": True},
        }
    )
    drawn = points(config, 300)
    rates = [point["train.learning_rate"] for point in drawn]
    assert min(rates) >= 1e-5 and max(rates) <= 1e-3
    assert 0.3 < sum(rate < 1e-4 for rate in rates) / len(rates) < 0.7
    assert all(1 <= point["distill.kl_weight"] <= 2 for point in drawn)
    assert {point["moe.importance_samples"] for point in drawn} == {10, 14}
    assert {8, 64} <= {point["train.batch_size"] for point in drawn} <= set(range(8, 65))


def test_conditions_that_wait_for_each_other_are_refused() -> None:
    found = faults(
        {
            "moe.top_k": {"choice": [1], "when": {"moe.router": "token_gate"}},
            "moe.router": {"from": "routers", "when": {"moe.top_k": 1}},
        }
    )
    assert "wait for each other" in found


def test_a_table_is_the_key_s_own_choices() -> None:
    for path in TABLES.values():
        field = MoeConfig.model_fields[path.partition(".")[2]]
        held = [set(table_values(table)) for table, other in TABLES.items() if other == path]
        left_out = {"task_importance", "token_clusters"} if path == "moe.partition" else set()
        assert set(get_args(field.annotation)) - set().union(*held) == left_out
        assert sum(map(len, held)) == len(set().union(*held))


def test_a_grid_holds_each_point_once() -> None:
    config = build(
        {
            "moe.tie_shared": {"choice": [True, False], "when": {"moe.partition": "importance"}},
            "moe.partition": {"choice": ["importance", "random", "inverse"]},
        },
        algorithm="grid",
    )
    dimensions, _ = parse_space(config.search.space)
    found = [point.overrides for point in grid_points(dimensions, config)]
    assert len(found) == 4
    assert {"moe.partition": "random"} in found


def test_a_grid_over_a_range_and_teachers_without_end_are_refused() -> None:
    found = faults({"finetune.learning_rate": {"uniform": [0.1, 0.2]}}, algorithm="grid")
    assert "a grid needs finitely many values" in found
    assert "ask for any number of teachers" in found


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("algorithm", "bohb", "use algorithm tpe with scheduler hyperband"),
        ("scheduler", "ahsa", "Did you mean asha?"),
    ],
)
def test_what_is_not_there_is_refused_with_a_remedy(key: str, value: str, said: str) -> None:
    assert said in faults({"seed": {"choice": [0, 1]}}, **{key: value})


RATES = {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}}


def test_a_population_draws_at_random_and_keeps_what_cannot_change() -> None:
    space = RATES | {"moe.num_experts": {"choice": [2, 4]}}
    search = build(space, scheduler="pbt").search
    assert search.is_population and search.chosen_algorithm == "random"
    assert not build(space).search.is_population


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"objectives": {"quality": "max", "flops": "min"}}, "give search.metric instead"),
        ({"metric": "flops"}, "does not change with training; use quality"),
        ({"algorithm": "tpe"}, "set search.algorithm to auto instead of tpe"),
        ({"rungs": 1}, "set search.rungs to 2 or more"),
        ({"num_trials": 1}, "set search.num_trials to 2 or more"),
        ({"time_budget_s": 60}, "a population goes to its end together; remove it"),
        ({"worker_budget_s": 60}, "a population starts and ends together; remove it"),
        ({"max_concurrent": 2}, "takes turns on all worker slots that there are; remove it"),
        ({"confirm_seeds": 2}, "which is not what the trial did; set it to 0"),
    ],
)
def test_what_a_population_cannot_do_is_refused_with_a_remedy(
    search: dict[str, Any], said: str
) -> None:
    assert said in faults(RATES, scheduler="pbt", **search)


def test_a_population_needs_one_worker_and_a_key_that_changes_in_flight() -> None:
    fixed = {"moe.num_experts": {"choice": [2, 4]}}
    found = faults(fixed, scheduler="pbt")
    assert "finds no key that can change in flight; add one of" in found
    assert "train.learning_rate" in found
    found = faults(RATES | {"parallel.num_workers": {"choice": [1, 2]}}, scheduler="pbt")
    assert "set parallel.num_workers to 1 for all of them" in found
    space = {
        "distill.kl_weight": {"choice": [0, 1]},
        "moe.num_experts": {"choice": [2, 4], "when": {"distill.kl_weight": 1}},
    }
    found = faults(space, scheduler="pbt")
    assert "search.space.moe.num_experts: it stays with a trial's weights" in found
    assert "depend on distill.kl_weight" in found


def test_several_objectives_need_no_scheduler() -> None:
    one = build({"seed": {"choice": [0]}}).search
    assert (one.chosen_scheduler, one.wanted) == ("asha", {"quality": "max"})
    two = build({"seed": {"choice": [0]}}, objectives={"quality": "max", "flops": "min"}).search
    assert (two.chosen_scheduler, list(two.wanted)) == ("none", ["quality", "flops"])
    cheap = build({"seed": {"choice": [0]}}, metric="latency").search
    assert cheap.wanted == {"latency": "min"}


def test_quality_is_better_the_way_that_the_data_say() -> None:
    space = {"seed": {"choice": [0]}}
    plain = build(space).search
    # As it was, so that sweeps of earlier versions go on.
    assert plain.directed(higher_is_better=True) == plain
    assert plain.directed(higher_is_better=False).wanted == {"quality": "min"}
    several = build(space, objectives={"quality": "auto", "latency": "auto"}).search
    assert several.directed(higher_is_better=True).wanted == {"quality": "max", "latency": "min"}
    lower = several.directed(higher_is_better=False)
    assert lower.wanted == {"quality": "min", "latency": "min"}
    told = build(space, mode="max").search
    assert told.directed(higher_is_better=False).wanted == {"quality": "max"}
    assert build(space, metric="perplexity").search.wanted == {"perplexity": "min"}
    assert build(space, metric="recall_at_1").search.wanted == {"recall_at_1": "max"}


def test_a_population_may_be_ranked_by_a_perplexity_and_by_no_cost() -> None:
    space = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    assert "does not change with training" in faults(space, scheduler="pbt", metric="latency")
    build(space, scheduler="pbt", metric="perplexity")


def test_a_point_leaves_the_teacher_alone() -> None:
    config = build({"train.learning_rate": {"choice": [1e-3]}})
    settings = point_settings(config, {"train.learning_rate": 1e-3})
    point = RunConfig.model_validate(settings)
    assert point.train.learning_rate == 1e-3
    assert point.teacher_train.learning_rate == config.train.learning_rate
    assert changes_teacher("finetune.learning_rate") and changes_teacher("seed")
    assert not changes_teacher("train.learning_rate")


def test_a_recipe_without_a_search_says_nothing_of_it() -> None:
    assert "search:" not in build_config(BASE).to_yaml()
    assert "search.space" in build({"seed": {"choice": [0, 1]}}).flatten()
