"""What can change while a distillation runs, and what a population of trials asks of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.run_config import RunConfig
from moe_dist.config.search_section import COSTS
from moe_dist.config.search_space import Dimension
from moe_dist.config.setting_kinds import in_flight_meaning, keys_of


def in_flight_keys() -> dict[str, str]:
    """List, with what a new value means, the keys that may change in flight.

    They change no tensor's shape, no data, no length and no schedule. `distill.mapping_weight` and
    `distill.adversarial_weight` bring parameters of their own, and are none of them; neither are
    the lengths of warm-ups, nor what decides how many steps there are.
    """
    found = {dotted: in_flight_meaning(owner, name) for dotted, owner, name in keys_of(RunConfig)}
    return {dotted: meaning for dotted, meaning in found.items() if meaning}


def changes_in_flight(path: str) -> bool:
    """Tell whether a key may change at a rung; others are drawn once and go with the weights."""
    return path in in_flight_keys()


def population_faults(config: RunConfig, dimensions: tuple[Dimension, ...]) -> Iterator[str]:
    """Check what population based training needs; one line for each fault."""
    search = config.search
    start = "search.scheduler=pbt"
    if search.objectives:
        yield f"{start} ranks trials by one measure; give search.metric instead of objectives."
    elif search.metric in COSTS:
        yield (
            f"{start} goes by what training reaches, and search.metric={search.metric} does not "
            "change with training; use quality, or scheduler none."
        )
    if search.algorithm not in ("auto", "random"):
        yield (
            f"{start} draws its population at random before the first step; set "
            f"search.algorithm to auto instead of {search.algorithm}."
        )
    if search.rungs < 2:
        yield f"{start} changes trials between rungs; set search.rungs to 2 or more."
    if search.num_trials < 2:
        yield f"{start} needs trials to choose among; set search.num_trials to 2 or more."
    for key, why in (
        ("time_budget_s", "a population goes to its end together"),
        ("worker_budget_s", "a population starts and ends together"),
        ("max_concurrent", "a population takes turns on all worker slots that there are"),
    ):
        if getattr(search, key) is not None:
            yield f"search.{key} does not go with {start}: {why}; remove it."
    if search.confirm_seeds:
        yield (
            f"search.confirm_seeds={search.confirm_seeds} does not go with {start}: it trains a "
            "trial's last values from the first step, which is not what the trial did; set it to 0."
        )
    if config.parallel.max_workers > 1 or any(
        one.path == "parallel.num_workers" for one in dimensions
    ):
        yield f"{start} needs trials of one worker; set parallel.num_workers to 1 for all of them."
    if isinstance(config.output_dir, str):
        yield (
            f"{start} hands weights on in a directory, and output_dir is a URI; give a directory "
            "that all nodes share."
        )
    yield from _space_faults(start, dimensions)


def _space_faults(start: str, dimensions: tuple[Dimension, ...]) -> Iterator[str]:
    moving = [one.path for one in dimensions if changes_in_flight(one.path)]
    if not moving:
        yield (
            f"search.space: {start} finds no key that can change in flight; add one of "
            f"{', '.join(in_flight_keys())}, or use scheduler asha."
        )
    for dimension in dimensions:
        if changes_in_flight(dimension.path):
            continue
        for other in sorted(dimension.depends_on & set(moving)):
            yield (
                f"search.space.{dimension.path}: it stays with a trial's weights, and cannot "
                f"depend on {other}, which {start} changes in flight; remove the condition."
            )
