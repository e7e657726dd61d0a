"""Checks a recipe's `search` section, down to whether the points of its space are valid recipes."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_dist.config.in_flight import population_faults
from moe_dist.config.overrides import apply_overrides
from moe_dist.config.run_config import RunConfig
from moe_dist.config.search_section import MEASURES
from moe_dist.config.search_space import (
    TEACHER_KEYS,
    TEACHER_SECTIONS,
    Dimension,
    Point,
    grid_points,
    grid_size,
    is_number,
    known_paths,
    parse_space,
    random_draw,
    sample_point,
    value_of,
)

NUM_SAMPLED_POINTS = 48
MAX_TEACHERS = 8
Faults = Callable[[Mapping[str, Any]], list[str]]


def find_search_faults(config: RunConfig, key_faults: Faults, cross_faults: Faults) -> list[str]:
    """Check the `search` section of a recipe.

    Args:
        config: the recipe.
        key_faults: lists what is wrong with single keys of raw settings, and not with the recipe's.
        cross_faults: lists the rules across keys that they break, and the recipe does not.

    Returns:
        One line for each fault.
    """
    search = config.search
    faults = list(_measure_faults(config))
    if not search.space or config.data.source == "tasks":
        return faults  # That several tasks cannot be searched on is said of the recipe.
    dimensions, space_faults = parse_space(search.space)
    faults += space_faults
    values = [fault for one in dimensions for fault in _value_faults(config, one, key_faults)]
    faults += values
    faults += _untrained_faults(config, dimensions)
    faults += _condition_faults(config, dimensions, key_faults)
    faults += _factor_faults(config, dimensions)
    faults += _shape_faults(config, dimensions)
    if search.is_population:
        faults += population_faults(config, dimensions)
    if not faults:
        faults += _point_faults(config, dimensions, cross_faults)
    return list(dict.fromkeys(faults))


def point_settings(config: RunConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Give the raw settings of one trial, without search and comparisons.

    The teacher's settings stay those of the recipe, whatever the point changes in `train`, so that
    trials share a teacher; keys of `finetune` in the point change it.
    """
    teacher = config.teacher_train
    raw = config.model_dump(exclude={"search", "compare"})
    raw["finetune"] = {key: getattr(teacher, key) for key in type(config.finetune).model_fields}
    apply_overrides(raw, dict(overrides))
    return raw


def _measure_faults(config: RunConfig) -> Iterator[str]:
    search = config.search
    names = list(search.objectives) or [search.metric]
    where = "objectives" if search.objectives else "metric"
    for name in names:
        if name not in MEASURES:
            close = difflib.get_close_matches(name, list(MEASURES), n=1)
            guess = f" Did you mean {close[0]}?" if close else ""
            yield f"search.{where}: {name} is not measured; use {', '.join(MEASURES)}.{guess}"
    if search.confirm_seeds == 1:
        yield "search.confirm_seeds=1 says nothing of noise; give 0, or at least 2."
    if search.objectives and search.metric != "quality":
        yield (
            f"search.metric={search.metric} and search.objectives are both given; keep one of them."
        )


def _value_faults(config: RunConfig, dimension: Dimension, key_faults: Faults) -> list[str]:
    """Check each value on its own: a key may hold it, whatever the others hold."""
    drawn = dimension.values if not dimension.of else ()
    return [
        f"search.space.{fault}"
        for value in (*drawn, *dimension.otherwise)
        for fault in key_faults(point_settings(config, {dimension.path: value}))
        if fault.startswith(dimension.path)
    ]


def _untrained_faults(config: RunConfig, dimensions: tuple[Dimension, ...]) -> Iterator[str]:
    """Refuse students without a step of training, of which trials have nothing to compare."""
    path = "train.num_epochs"
    own = {one.path: (*one.values, *one.otherwise) for one in dimensions if not one.of}
    if path not in own and config.train.num_epochs == 0:
        yield f"{path}=0 trains no student, so a search has nothing to compare; give 1 or more."
    if 0 in own.get(path, ()):
        yield f"search.space.{path}: a trial of 0 epochs trains no student; begin at 1."


def _condition_faults(
    config: RunConfig, dimensions: tuple[Dimension, ...], key_faults: Faults
) -> Iterator[str]:
    """Refuse conditions on what a key cannot be: they would hold never, or always, unnoticed."""
    paths = known_paths()  # Of another one the space itself has said that it is no key.
    for dimension in dimensions:
        for condition in dimension.conditions:
            values = condition.values if condition.path in paths else ()
            yield from (
                f"search.space.{dimension.path}: when asks for what cannot be: {fault}"
                for value in values
                for fault in key_faults(point_settings(config, {condition.path: value}))
                if fault.startswith(condition.path)
            )


def _factor_faults(config: RunConfig, dimensions: tuple[Dimension, ...]) -> Iterator[str]:
    """Refuse `of` where there are no two numbers to multiply."""
    by_path = {dimension.path: dimension for dimension in dimensions}
    for dimension in dimensions:
        if dimension.of not in known_paths():
            continue  # There is no `of`, or the space itself has said that it names no key.
        yield from (
            f"search.space.{dimension.path}: `of` makes its values factors, and {value!r} is no "
            "number; give numbers, or remove `of`."
            for value in dimension.values
            if not is_number(value)
        )
        other = by_path.get(dimension.of)
        drawn = () if other is None else (*other.values, *other.otherwise)
        rests = other is None or (other.conditions and not other.otherwise)
        own = (value_of(config, dimension.of),) if rests else ()
        for value in (*drawn, *own):
            if not is_number(value):
                yield (
                    f"search.space.{dimension.path}: of={dimension.of} may be {value!r}, which is "
                    "no number to multiply; name a key that is one."
                )


def _shape_faults(config: RunConfig, dimensions: tuple[Dimension, ...]) -> Iterator[str]:
    search = config.search
    if search.chosen_algorithm == "grid":
        for dimension in dimensions:
            if dimension.choices is None:
                yield (
                    f"search.space.{dimension.path}: a grid needs finitely many values, and "
                    f"{dimension.kind} is a range; use choice, or search.algorithm tpe."
                )
    if config.student.is_smaller or any(one.path.startswith("student.") for one in dimensions):
        yield (
            "search: trials keep the teacher's depth and width; leave the `student` section out, "
            "and compare smaller students with `compare`."
        )
    if any(one.path == "data.holdout_samples" for one in dimensions):
        yield (
            "search.space.data.holdout_samples: trials that are measured on different rows cannot "
            "be ranked; set it for all of them."
        )
    of_teacher = [one for one in dimensions if changes_teacher(one.path)]
    num_teachers = grid_size(tuple(of_teacher))
    if num_teachers > MAX_TEACHERS:
        names = ", ".join(one.path for one in of_teacher)
        count = "any number of" if num_teachers == float("inf") else f"{num_teachers:.0f}"
        yield (
            f"search.space: {names} ask for {count} teachers, since trials that differ there share "
            f"none; keep their combinations to {MAX_TEACHERS}, as choices."
        )
    for dimension in of_teacher:
        if dimension.of:
            yield (
                f"search.space.{dimension.path}: `of` does not go with a key that changes the "
                "teacher; give the values themselves."
            )


def changes_teacher(path: str) -> bool:
    """Tell whether trials that differ in a key need different teachers or scores."""
    return path.split(".")[0] in TEACHER_SECTIONS or path in TEACHER_KEYS


def _point_faults(
    config: RunConfig, dimensions: tuple[Dimension, ...], cross_faults: Faults
) -> list[str]:
    """Resolve sample points, or all of a small space, as recipes."""
    found: dict[str, str] = {}
    for point in _sampled(config, dimensions):
        for fault in cross_faults(point_settings(config, point.overrides)):
            said = ", ".join(f"{path}={value}" for path, value in point.overrides.items())
            # One example of each fault is enough, whatever its numbers are.
            found.setdefault(
                fault.split("=")[0],
                f"search.space: at {said}: {fault} `when` and `of` keep such points out.",
            )
    return list(found.values())


def _sampled(config: RunConfig, dimensions: tuple[Dimension, ...]) -> Iterator[Point]:
    if grid_size(dimensions) <= NUM_SAMPLED_POINTS:
        yield from grid_points(dimensions, config)
        return
    for number in range(NUM_SAMPLED_POINTS):
        draw = random_draw(random.Random(f"check-{config.seed}-{number}"))
        yield sample_point(dimensions, config, draw)
