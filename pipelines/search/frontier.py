"""The cheapest model that keeps a quality: a default space, and the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moe_dist.config import RunConfig, build_config
from moe_dist.config.search_checks import point_settings
from moe_dist.config.search_section import COSTS, MEASURES
from moe_dist.config.search_space import TABLES, table_values
from moe_dist.errors import ConfigError, ConversionError
from moe_dist.router_spec import ROUTER_FACTS
from moe_dist.search.objectives import Goal
from moe_dist.search.trials import BASELINE, Trial
from moe_dist.workers.worker_cpus import trial_cpus

from .measures import shown
from .sweep import SweepResult
from .teachers import teacher_key
from .trial import LATENCY_SEQ_LEN

if TYPE_CHECKING:
    from ..console import Console

NUM_EXPERTS = (1, 2, 4, 8)
SIZE_SHARES = (0.125, 0.25, 0.5, 0.75)
SHARED_SHARES = (0.0, 0.5, 0.75)
MAX_MEASURED = 5
MEASURE_ROUNDS = 7
SEVERAL = {"moe.num_experts": {"not": [1]}}


def goal_config(config: RunConfig, goals: Sequence[Goal], cost: str, console: Console) -> RunConfig:
    """Give a recipe objectives and, where it has no space, one of pruned dense and MoE students."""
    kept = next((goal.metric for goal in goals if goal.metric not in COSTS), "quality")
    search = config.search.model_dump()
    # What a goal bounds must be measured, latency above all, which costs time.
    bounded = {goal.metric: _direction(goal) for goal in goals}
    objectives = {kept: "auto", cost: "min"} | bounded
    search |= {"metric": "quality", "mode": "auto", "objectives": objectives}
    if not config.search.space:
        search["space"] = frontier_space(config, _ffn_size(config, console))
    raw = config.model_dump() | {"search": search, "compare": {}}
    return build_config(raw, source=config.name)


def _direction(goal: Goal) -> str:
    """Say which way a bounded measure is better; of `quality` the data know it, not the name."""
    return "auto" if goal.metric == "quality" else MEASURES[goal.metric]


def frontier_space(config: RunConfig, ffn_size: int) -> dict[str, Any]:
    """Write a space of students of all sizes, with whatever routers and partitions there are.

    One expert is the pruned dense student. `ffn_size` is the teacher's; returned as
    `search.space`.
    """
    sizes = sorted({max(1, round(ffn_size * share)) for share in SIZE_SHARES})
    routers = "merged_routers" if config.moe.router_spec.facts.merges else "routers"
    space: dict[str, Any] = {
        "moe.num_experts": {"choice": list(NUM_EXPERTS)},
        "moe.expert_size": {"choice": sizes},
        "moe.num_shared_neurons": {
            "choice": list(SHARED_SHARES),
            "of": "moe.expert_size",
            "when": SEVERAL,
            "otherwise": 0,
        },
        "moe.tie_shared": {
            "choice": [True, False],
            "when": {**SEVERAL, "moe.num_shared_neurons": {"not": [0]}},
            "otherwise": False,
        },
        "moe.top_k": {"choice": [1, 2], "when": SEVERAL, "otherwise": 1},
        "moe.partition": {"choice": _usable(config, "partitions")},
        "moe.router": {
            "choice": _usable(config, routers),
            "when": SEVERAL,
            "otherwise": config.moe.router,
        },
    }
    gateless = [name for name in table_values(routers) if not ROUTER_FACTS[name].has_gate]
    for key in ("load_balancing_weight", "z_loss_weight"):
        weight = getattr(config.distill, key)
        if weight > 0:
            space[f"distill.{key}"] = {
                "choice": [weight],
                "when": {**SEVERAL, "moe.router": {"not": gateless}},
                "otherwise": 0.0,
            }
    if config.parallel.ep_size > 1:
        space["parallel.ep_size"] = {
            "choice": [config.parallel.ep_size],
            "when": SEVERAL,
            "otherwise": 1,
        }
    return space


def _usable(config: RunConfig, table: str) -> list[Any]:
    """Leave out what the recipe lacks something for."""
    path = TABLES[table]
    loose = {"distill.load_balancing_weight": 0.0, "distill.z_loss_weight": 0.0}
    usable = []
    for name in table_values(table):
        try:
            build_config(point_settings(config, {**loose, path: name}), source=config.name)
        except ConfigError:
            continue
        # All neurons in every expert: no student is smaller.
        if name != "full_copy":
            usable.append(name)
    return usable


def _ffn_size(config: RunConfig, console: Console) -> int:
    from moe_dist.conversion.families import find_slots

    from ..chain.workspace import Workspace
    from ..checks.sizes import start_skeleton

    slots = find_slots(start_skeleton(Workspace(config, console), 2))
    if not slots:
        raise ConversionError(
            f"{config.model.teacher} has no feed-forward layers that could be split",
            remedy="choose another model.teacher.",
        )
    return int(slots[0].num_neurons)


@dataclass(frozen=True)
class Answer:
    """What a goal came to.

    Attributes:
        trial: the cheapest that meets it, else the one that comes closest; None without trials.
        is_met: whether it meets it.
        num_meeting: how many do.
        lines: the same in words.
        goals: what was asked for.
    """

    trial: Trial | None
    is_met: bool
    num_meeting: int
    lines: tuple[str, ...]
    goals: tuple[Goal, ...] = ()


def answer_goal(
    result: SweepResult,
    goals: Sequence[Goal],
    cost: str,
    remeasured: Mapping[int, float] | None = None,
) -> Answer:
    """Choose the cheapest model that meets every goal.

    `remeasured` holds the cost of some trials, measured again with nothing beside it.
    """
    again = remeasured or {}
    whole = [trial for trial in result.trials.values() if trial.status == "finished"]
    meeting = [trial for trial in whole if all(goal.is_met(trial.metrics) for goal in goals)]
    said = " and ".join(str(goal) for goal in goals)
    if not whole:
        open_words = f"No trial was trained to the end: {said} is open."
        return Answer(None, False, 0, (open_words,), tuple(goals))
    if not meeting:
        closest = min(whole, key=lambda trial: _distance(trial, goals))
        reached = ", ".join(
            f"{goal.metric} {shown(goal.metric, closest.value(goal.metric))}" for goal in goals
        )
        return Answer(
            closest,
            False,
            0,
            (
                f"None of {len(whole)} models meets {said}.",
                f"The closest is trial {closest.number} with {reached}, at {cost} "
                f"{shown(cost, closest.value(cost))}: {describe_student(closest)}.",
            ),
            tuple(goals),
        )
    pool = [trial for trial in meeting if trial.number in again] or meeting
    best = min(pool, key=lambda trial: (again.get(trial.number, trial.value(cost)), trial.number))
    price = again.get(best.number, best.value(cost))
    kept = ", ".join(
        f"{goal.metric} {shown(goal.metric, best.value(goal.metric))}" for goal in goals
    )
    return Answer(
        best,
        True,
        len(meeting),
        (
            f"The cheapest of {len(meeting)} models (of {len(whole)}) that meet {said}: trial "
            f"{best.number}, {cost} {shown(cost, price)}, {kept}.",
            f"It is {describe_student(best)}.",
        ),
        tuple(goals),
    )


def describe_student(trial: Trial) -> str:
    """Say in a few words what a trial's student is."""
    if trial.number == BASELINE:
        return "the recipe as it stands"
    point = trial.overrides
    kind = "the pruned dense student" if point.get("moe.num_experts") == 1 else "a student"
    said = ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in point.items())
    return f"{kind} with {said}"


def _distance(trial: Trial, goals: Sequence[Goal]) -> float:
    worst = 0.0
    for goal in goals:
        value = trial.value(goal.metric)
        if math.isnan(value):
            return math.inf
        if not goal.is_met(trial.metrics):
            worst = max(worst, abs(value - goal.bound) / max(abs(goal.bound), 1e-12))
    return worst


def measure_again(result: SweepResult, goals: Sequence[Goal]) -> dict[int, float]:
    """Time the cheapest models that meet the goals, in turn, with nothing of ours beside them.

    Ray must be down. Returns the median latency in ms of `MAX_MEASURED` trials at most.
    """
    from moe_dist.inference import load_model
    from moe_dist.inference.saving import load_tokenizer
    from moe_dist.jobs.results import load_scores
    from moe_dist.measure.latency import Rounds, measure_in_turn
    from moe_dist.storage import local_file

    from ..chain.workspace import Workspace
    from ..console import Console
    from ..stages.adapt import convert

    meeting = [
        trial
        for trial in result.trials.values()
        if trial.status == "finished" and all(goal.is_met(trial.metrics) for goal in goals)
    ]
    meeting.sort(key=lambda trial: trial.value("latency"))
    models: dict[int, Any] = {}
    for trial in meeting[:MAX_MEASURED]:
        facts = result.teachers[teacher_key(result.config, trial.overrides)]
        config = RunConfig.model_validate(point_settings(result.config, trial.overrides))
        with local_file(facts.scores) as path:
            scores = load_scores(path)
        workspace = Workspace(config, Console(quiet=True))
        tokenizer = load_tokenizer(facts.model)
        models[trial.number] = convert(
            config,
            load_model(facts.model),
            scores,
            partial(workspace.encoded_tasks, "train", tokenizer),
        )[1]
    size = result.config.search.latency_batch_size
    timed = measure_in_turn(
        models,
        Rounds(MEASURE_ROUNDS, least=MEASURE_ROUNDS, repeats=3),
        batch_sizes=(size,),
        seq_len=min(LATENCY_SEQ_LEN, result.config.model.max_length),
        threads=trial_cpus(result.config.parallel.cpus_per_worker),
    )
    return {number: by_size[size].median_ms for number, by_size in timed.items()}
