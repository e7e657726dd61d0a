"""The space of a search: how it is written, what is wrong with it, and drawing points from it."""

from __future__ import annotations

import difflib
import itertools
import math
import random
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel

from moe_dist.config.run_config import RunConfig
from moe_dist.config.sections import MAX_NUMBER
from moe_dist.router_spec import ROUTER_FACTS

Kind = Literal["choice", "uniform", "loguniform", "integers"]
Draw = Callable[["Dimension"], Any]
RANGES: tuple[Kind, ...] = ("uniform", "loguniform", "integers")
TABLES = {
    "routers": "moe.router",
    "merged_routers": "moe.router",
    "partitions": "moe.partition",
    "gate_scales": "moe.gate_scale",
}
"""Tables that a space may name, and the key whose choices each of them is."""
_FOR_ONE_ROUTER = ("task_importance", "token_clusters")
"""Rows that fit one router alone, so that a table, which is drawn beside any router, lacks them."""
SEARCHABLE_SECTIONS = ("seed", "model", "data", "finetune", "moe", "distill", "train", "parallel")
TEACHER_SECTIONS = ("seed", "model", "data", "finetune")
"""Keys that change the teacher or its data: trials that differ here share no teacher."""
TEACHER_KEYS = ("moe.importance_samples", "train.precision")
_OPTIONS = ("when", "otherwise", "of", "step", "log", "except")


@dataclass(frozen=True)
class Condition:
    """When a dimension counts: another key has one of some values, or none of them.

    Args:
        path: the other key.
        values: those it is compared with.
        negated: whether it must have none of them.
    """

    path: str
    values: tuple[Any, ...]
    negated: bool = False

    def holds(self, value: Any) -> bool:
        """Tell whether the other key's value meets the condition."""
        return (value in self.values) is not self.negated


@dataclass(frozen=True)
class Dimension:
    """One key of the space.

    Args:
        path: its dotted name.
        kind: how values are drawn.
        values: the choices, or the low and high end.
        step: of `integers`.
        log: whether `integers` are spread by their logarithm.
        conditions: all must hold, or the key is not drawn.
        otherwise: its value then, in a tuple; empty where the recipe's own stays.
        of: a key whose value the drawn one is multiplied with, and rounded where that is whole.
    """

    path: str
    kind: Kind
    values: tuple[Any, ...]
    step: int = 1
    log: bool = False
    conditions: tuple[Condition, ...] = ()
    otherwise: tuple[Any, ...] = ()
    of: str = ""

    @property
    def depends_on(self) -> set[str]:
        """The keys that must be known before."""
        return {condition.path for condition in self.conditions} | ({self.of} if self.of else set())

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """Every value, where there are finitely many."""
        if self.kind == "choice":
            return self.values
        if self.kind == "integers":
            return tuple(range(self.values[0], self.values[1] + 1, self.step))
        return None


@dataclass(frozen=True)
class Point:
    """One point of a space.

    Args:
        drawn: what was drawn, by path; keys whose conditions do not hold are not in it.
        overrides: what a recipe is changed by.
    """

    drawn: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)


def value_of(config: RunConfig, path: str) -> Any:
    """Read a setting by its dotted name."""
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value


def is_number(value: object) -> bool:
    """Tell whether a key's value can be counted with; true and false cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def sample_point(dimensions: tuple[Dimension, ...], config: RunConfig, draw: Draw) -> Point:
    """Draw a point, dimension by dimension; conditions are looked at on the way."""
    drawn: dict[str, Any] = {}
    overrides: dict[str, Any] = {}

    def known(path: str) -> Any:
        return overrides[path] if path in overrides else value_of(config, path)

    for dimension in dimensions:
        if all(condition.holds(known(condition.path)) for condition in dimension.conditions):
            value = drawn[dimension.path] = draw(dimension)
            if dimension.of:
                whole = known(dimension.of)
                # A share of a count is a count; of a weight or a rate it is a number like it.
                value = round(value * whole) if isinstance(whole, int) else value * whole
            overrides[dimension.path] = value
        elif dimension.otherwise:
            overrides[dimension.path] = dimension.otherwise[0]
    return Point(drawn, overrides)


def random_draw(generator: random.Random) -> Draw:
    """Return what draws a value of one dimension at random."""

    def draw(dimension: Dimension) -> Any:
        if dimension.kind == "choice":
            return generator.choice(dimension.values)
        low, high = dimension.values
        if dimension.kind == "integers":
            if dimension.log:
                drawn = math.exp(generator.uniform(math.log(low), math.log(high + 1)))
                return min(high, int(drawn))
            return generator.randrange(low, high + 1, dimension.step)
        if dimension.kind == "uniform":
            return generator.uniform(low, high)
        return math.exp(generator.uniform(math.log(low), math.log(high)))

    return draw


def grid_points(dimensions: tuple[Dimension, ...], config: RunConfig) -> Iterator[Point]:
    """Go through every point of a finite space once, each with other overrides."""
    seen: set[str] = set()
    by_path = [dimension.path for dimension in dimensions]
    for values in itertools.product(*(dimension.choices or () for dimension in dimensions)):
        chosen = dict(zip(by_path, values, strict=True))
        point = sample_point(dimensions, config, partial(_look_up, chosen))
        key = repr(sorted(point.overrides.items(), key=lambda item: item[0]))
        if key not in seen:
            seen.add(key)
            yield point


def _look_up(chosen: Mapping[str, Any], dimension: Dimension) -> Any:
    return chosen[dimension.path]


def grid_size(dimensions: tuple[Dimension, ...]) -> float:
    """Count the combinations, conditions not looked at; infinite where there is a range."""
    return math.prod(
        math.inf if dimension.choices is None else len(dimension.choices)
        for dimension in dimensions
    )


def parse_space(space: Mapping[str, Any]) -> tuple[tuple[Dimension, ...], list[str]]:
    """Read `search.space`: dimensions, each after those it depends on, and the faults."""
    faults: list[str] = []
    found: dict[str, Dimension] = {}
    for path, entry in _flat(space).items():
        own: list[str] = []
        dimension = _parse(path, entry, own)
        faults += [f"search.space.{path}: {fault}" for fault in own]
        if dimension is not None and not own:
            found[path] = dimension
    for path, dimension in found.items():
        faults += [
            f"search.space.{path}: {word} names {other}, which {why}"
            for word, other, why in _wrong_references(dimension)
        ]
    return _ordered(found, faults), faults


def known_paths() -> list[str]:
    """List the dotted keys that a space may name."""
    paths = []
    for name, entry in RunConfig.model_fields.items():
        if name not in SEARCHABLE_SECTIONS:
            continue
        kind: Any = entry.annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        paths += [f"{name}.{key}" for key in kind.model_fields] if is_section else [name]
    return paths


def table_values(table: str) -> tuple[Any, ...]:
    """List the names now in a table of `TABLES` that one task can use, later additions too."""
    section, key = TABLES[table].split(".")
    kind = RunConfig.model_fields[section].annotation
    assert isinstance(kind, type) and issubclass(kind, BaseModel)
    names = typing.get_args(kind.model_fields[key].annotation)
    if TABLES[table] == "moe.router":
        # Merged experts want another start and other settings than those that tokens travel to.
        merges = table == "merged_routers"
        return tuple(name for name in names if ROUTER_FACTS[name].merges is merges)
    return tuple(name for name in names if name not in _FOR_ONE_ROUTER)


def _flat(space: Mapping[str, Any]) -> dict[str, Any]:
    """Let `moe: {router: ...}` mean `moe.router: ...`."""
    flat: dict[str, Any] = {}
    for name, entry in space.items():
        is_section = str(name) in SEARCHABLE_SECTIONS and str(name) != "seed"
        if is_section and isinstance(entry, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in entry.items()}
        else:
            flat[str(name)] = entry
    return flat


def _parse(path: str, entry: Any, faults: list[str]) -> Dimension | None:
    if fault := _path_fault(path):
        faults.append(fault)
    if not isinstance(entry, Mapping):
        faults.append("is not a mapping; write for example {choice: [1, 2]}.")
        return None
    kinds = [key for key in ("choice", *RANGES, "from") if key in entry]
    faults += [
        f"has the unknown key {key!r}; give one of choice, {', '.join(RANGES)}, from, and "
        f"{', '.join(_OPTIONS)} beside it."
        for key in entry
        if key not in (*kinds, *_OPTIONS)
    ]
    if len(kinds) != 1:
        said = " and ".join(kinds) if kinds else "none"
        faults.append(f"needs one of choice, {', '.join(RANGES)} or from, and has {said}.")
        return None
    kind = kinds[0]
    conditions = _conditions(entry.get("when", {}), faults)
    otherwise = (entry["otherwise"],) if "otherwise" in entry else ()
    if otherwise and not conditions:
        faults.append("has `otherwise` without `when`; add the condition, or remove it.")
    of = entry.get("of", "")
    if not isinstance(of, str):
        faults.append(f"of={of!r} is not a key; write for example `of: moe.expert_size`.")
        return None
    common: dict[str, Any] = {"conditions": conditions, "otherwise": otherwise, "of": of}
    if kind in ("choice", "from"):
        values = _choices(kind, path, entry, faults)
        return None if values is None else Dimension(path, "choice", values, **common)
    return _range(path, typing.cast("Kind", kind), entry, common, faults)


def _path_fault(path: str) -> str:
    paths = known_paths()
    if path in paths:
        return ""
    if path.split(".")[0] not in SEARCHABLE_SECTIONS:
        return (
            "cannot be searched: it says where and what the run is, not how it learns; use keys of "
            f"{', '.join(SEARCHABLE_SECTIONS)}."
        )
    close = difflib.get_close_matches(path, paths, n=1)
    return f"is an unknown key.{f' Did you mean {close[0]}?' if close else ''}"


def _conditions(when: Any, faults: list[str]) -> tuple[Condition, ...]:
    if not isinstance(when, Mapping):
        faults.append("when is not a mapping; write for example `when: {moe.tie_shared: true}`.")
        return ()
    conditions = []
    for path, wanted in when.items():
        negated = isinstance(wanted, Mapping)
        if negated and set(wanted) != {"not"}:
            faults.append(f"when {path} is no value, list of values or {{not: ...}}; give one.")
            continue
        values = wanted["not"] if isinstance(wanted, Mapping) else wanted
        listed = tuple(values) if isinstance(values, list | tuple) else (values,)
        conditions.append(Condition(str(path), listed, negated))
    return tuple(conditions)


def _choices(
    kind: str, path: str, entry: Mapping[str, Any], faults: list[str]
) -> tuple[Any, ...] | None:
    for option in ("step", "log"):
        if option in entry:
            faults.append(f"has `{option}`, which belongs to integers; remove it.")
    values = entry[kind]
    if kind == "from":
        if values not in TABLES:
            faults.append(f"from={values!r} is no table; use one of {', '.join(TABLES)}.")
            return None
        if TABLES[values] != path:
            faults.append(f"from={values} holds values of {TABLES[values]}, not of this key.")
            return None
        values = list(table_values(values))
    if not isinstance(values, list | tuple) or not values:
        faults.append(f"choice={values!r} is not a list of values; write for example [1, 2].")
        return None
    left_out = entry.get("except", [])
    left_out = list(left_out) if isinstance(left_out, list | tuple) else [left_out]
    if unknown := [value for value in left_out if value not in values]:
        faults.append(f"except={unknown} is not among the values {list(values)}; correct it.")
    kept = tuple(tuple(v) if isinstance(v, list) else v for v in values if v not in left_out)
    if not kept:
        faults.append("except leaves no value; keep one.")
    return kept or None


def _range(
    path: str, kind: Kind, entry: Mapping[str, Any], common: dict[str, Any], faults: list[str]
) -> Dimension | None:
    ends = entry[kind]
    numbers = (int,) if kind == "integers" else (int, float)
    if (
        not isinstance(ends, list | tuple)
        or len(ends) != 2
        or any(isinstance(end, bool) or not isinstance(end, numbers) for end in ends)
    ):
        what = "whole numbers" if kind == "integers" else "numbers"
        faults.append(f"{kind}={ends!r} is not a pair of {what}; write [low, high].")
        return None
    low, high = ends
    if not all(abs(end) <= MAX_NUMBER for end in ends):  # nan is not either
        faults.append(f"{kind}={ends!r} has an end that is no number up to {MAX_NUMBER:g}.")
        return None
    step, log = entry.get("step", 1), entry.get("log", False)
    if low >= high:
        faults.append(f"{kind}=[{low}, {high}] has no room; give the lower end first.")
    if low <= 0 and (kind == "loguniform" or log):
        faults.append(f"{kind}=[{low}, {high}] has no logarithm at {low}; begin above 0.")
    if "except" in entry:
        faults.append("has `except`, which belongs to choice and from; remove it.")
    if kind != "integers" and ("step" in entry or "log" in entry):
        faults.append(f"has `step` or `log`, which belong to integers, not {kind}; remove it.")
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        faults.append(f"step={step!r} is not a whole number of at least 1; correct it.")
    if not isinstance(log, bool) or (log and step != 1):
        faults.append("log is true or false, and goes with step 1 only; correct it.")
    if faults:
        return None
    if kind == "integers":
        high = low + (high - low) // step * step
    return Dimension(path, kind, (low, high), step=step, log=log, **common)


def _wrong_references(dimension: Dimension) -> Iterator[tuple[str, str, str]]:
    paths = known_paths()
    for word, others in (
        ("when", [condition.path for condition in dimension.conditions]),
        ("of", [dimension.of] if dimension.of else []),
    ):
        for other in others:
            if other not in paths:
                yield word, other, "is no key that a space may name; correct it."
            elif other == dimension.path:
                yield word, other, "is the key itself; name another."


def _ordered(found: dict[str, Dimension], faults: list[str]) -> tuple[Dimension, ...]:
    ordered: dict[str, Dimension] = {}
    waiting = dict(found)
    while waiting:
        ready = [
            path
            for path, dimension in waiting.items()
            if not (dimension.depends_on - {path}) & set(waiting)
        ]
        if not ready:
            faults.append(
                f"search.space: the conditions of {' and '.join(waiting)} wait for each other; "
                "remove one of them."
            )
            break
        for path in ready:
            ordered[path] = waiting.pop(path)
    return tuple(ordered.values())
