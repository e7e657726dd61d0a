"""What a search would do, for `--dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_dist.config.data_checks import data_sections
from moe_dist.config.search_space import grid_size, parse_space
from moe_dist.data.metrics import METRICS
from moe_dist.errors import ConfigError

from ..chain.workspace import Workspace
from ..checks.sizes import checked_sizes, unread_data
from .rungs import rung_times
from .sweep import check_metrics, directed
from .teachers import teacher_key, teacher_points

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from ..console import Console


def show_plan(config: RunConfig, console: Console) -> None:
    """Print what a recipe's search would try; nothing is run.

    A ConfigError if there is no space, or the data have no such metric.
    """
    search = config.search
    if not search.space:
        raise ConfigError(["search.space is missing; see docs/search.md."], source=config.name)
    workspace = Workspace(config, console)
    unknown = checked_sizes(config, workspace).unknown
    unread = list(unread_data(data_sections(config)))
    if not unread:
        config = directed(config, workspace)
        check_metrics(config, workspace)
        search = config.search
    elif METRICS.keys() & search.wanted.keys():
        unknown.append(f"whether the data have these metrics: they are {', and '.join(unread)}.")
    dimensions, _ = parse_space(search.space)
    size = grid_size(dimensions)
    console.result(f"{config.name}: the search is valid; nothing was run.")
    for dimension in dimensions:
        shown = ", ".join(str(value) for value in dimension.values)
        between = shown if dimension.kind == "choice" else f"{dimension.kind} {shown}"
        when = "".join(
            f"; when {one.path} is {'not ' * one.negated}{list(one.values)}"
            for one in dimension.conditions
        )
        of = f" × {dimension.of}" if dimension.of else ""
        console.result(f"  {dimension.path}: {between}{of}{when}")
    points = "a continuous space" if size == float("inf") else f"at most {size:.0f} points"
    teachers = {teacher_key(config, one) for one in teacher_points(config, dimensions)}
    baseline = " and the recipe as it stands" if search.baseline else ""
    console.result(f"{points}; {search.num_trials} trials{baseline}")
    console.result(f"algorithm {search.chosen_algorithm}, scheduler {search.chosen_scheduler}")
    times = rung_times(search)
    shares = ", ".join(f"{100 * time / times[-1]:.0f} %" for time in times)
    console.result(f"measured at {shares} of a trial's steps; objectives {search.wanted}")
    console.result(f"{len(teachers)} teacher{'s' if len(teachers) > 1 else ''} for all trials")
    for line in unknown:
        console.result(f"not known: {line}")
