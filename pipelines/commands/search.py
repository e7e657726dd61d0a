"""The commands `search` and `benchmark search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command_line import (
    EXIT_FAILURE,
    AsJson,
    Debug,
    DryRun,
    Overrides,
    Quiet,
    Recipe,
    clean_errors,
    note_unread_speedup,
    quieten_libraries,
)
from .run_command import open_console

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.search.trials import Trial
    from moe_dist.tracking import TrackedRun

    from ..console import Console
    from ..search.frontier import Answer
    from ..search.sweep import SweepResult


def register(app: typer.Typer, benchmark_app: typer.Typer) -> None:
    """Add the commands to the program and its benchmarks."""
    app.command("search")(search)
    benchmark_app.command("search")(benchmark_search)


def search(
    recipe: Recipe,
    overrides: Overrides = None,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take the `search` section of another recipe."),
    ] = None,
    goal: Annotated[
        str,
        typer.Option(help="What the model must keep, such as 'retention>=0.99'; with --minimize."),
    ] = "",
    minimize: Annotated[
        str,
        typer.Option(
            help="With --goal: latency (also when not given), flops, parameters or "
            "active_parameters."
        ),
    ] = "",
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search over a recipe's choices on Ray Tune, or for the cheapest model that keeps a goal."""
    with clean_errors(debug=debug):
        quieten_libraries()
        with open_console(quiet=quiet, as_json=as_json) as console:
            is_met = _check_and_search(
                recipe, overrides or [], space, goal, minimize, console, dry_run=dry_run
            )
    if not is_met:
        raise typer.Exit(EXIT_FAILURE)


def benchmark_search(
    trials: Annotated[int, typer.Option(help="Trials of one worker in each sweep.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps of one trial.")] = 24,
    batch_size: Annotated[int, typer.Option(help="Sentences in one of them.")] = 16,
    max_train_samples: Annotated[int, typer.Option(help="Training rows.")] = 1000,
    max_dev_samples: Annotated[int, typer.Option(help="Rows that trials are measured on.")] = 256,
    asha: Annotated[bool, typer.Option(help="Compare ASHA with training all to the end.")] = True,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe with a search section; the demo's by default.")
    ] = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Time a sweep of small trials, and count what ASHA saves."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from ..benchmarks.search import ROUTER_RECIPE, SearchBenchmark, main

        main(
            SearchBenchmark(
                recipe=recipe or ROUTER_RECIPE,
                num_trials=trials,
                num_steps=steps,
                batch_size=batch_size,
                max_train_samples=max_train_samples,
                max_dev_samples=max_dev_samples,
                with_asha=asha,
                overrides=tuple(overrides or ()),
            )
        )


def _check_and_search(
    recipe: Path,
    overrides: list[str],
    space: Path | None,
    goal: str,
    minimize: str,
    console: Console,
    *,
    dry_run: bool,
) -> bool:
    from ..checks.cluster_package import cluster_module

    config = _load(recipe, overrides, space)
    note_unread_speedup(config, "search", console)
    goals, minimize = _goals(goal, minimize, config)
    if goals:
        from ..search.frontier import goal_config

        config = goal_config(config, goals, minimize, console)
    if dry_run:
        from ..search.plan import show_plan

        show_plan(config, console)
        return True
    lasting = cluster_module("lasting")
    if lasting.in_ray_job():
        lasting.check_job(config)
    return _search(config, console, goals, minimize)


def _load(recipe: Path, overrides: list[str], space: Path | None) -> RunConfig:
    from moe_dist.config import build_config, read_settings
    from moe_dist.config.override_texts import parse_overrides
    from moe_dist.config.overrides import apply_overrides

    raw = read_settings(recipe)
    if space is not None:
        raw["search"] = read_settings(space).get("search", {})
    apply_overrides(raw, parse_overrides(overrides))
    return build_config(raw, source=str(recipe))


def _goals(goal: str, minimize: str, config: RunConfig) -> tuple[Any, str]:
    from moe_dist.data.tasks import improves_upwards
    from moe_dist.errors import ConfigError
    from moe_dist.search.objectives import check_cost, parse_goals

    if not goal:
        if minimize:
            raise ConfigError(
                [
                    f"--minimize {minimize} needs a --goal, what the model must keep; give for "
                    "example --goal 'retention>=0.99'."
                ],
                source="the command line",
            )
        return (), ""
    minimize = minimize or "latency"
    check_cost(minimize)
    data = config.data
    is_upwards = improves_upwards(data.kind, data.name, data.subset, data.metrics)
    return parse_goals(goal, "max" if is_upwards else "min"), minimize


def _search(config: RunConfig, console: Console, goals: Any, minimize: str) -> bool:
    import signal

    from ..search.results import verdict_lines, write_results
    from ..search.sweep import search_recipe

    # A stop from outside ends a sweep as Ctrl-C does: Ray taken down, to be continued.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    said: list[str] = []
    outcome: dict[str, Any] = {}

    def choose(result: SweepResult) -> Trial | None:
        answer = outcome["answer"] = _answer(result, goals, minimize)
        return answer.trial

    def finish(result: SweepResult, run: TrackedRun) -> int | None:
        answer = outcome.get("answer")
        summary = outcome["summary"] = write_results(result, run, answer)
        said.extend(verdict_lines(summary))
        said.extend([] if result.confirmed is None else [str(result.confirmed)])
        best = summary["best"]
        return None if best is None else int(best["trial"])

    result = search_recipe(config, console, finish, choose if goals else None)
    summary = outcome["summary"]
    console.document(
        {
            "event": "report",
            "path": result.files.shown(result.directory / "report.json"),
            "report": summary,
            "mlflow": result.open_hint,
        },
        lambda: _show(result, summary, said, console),
    )
    return not goals or bool(outcome["answer"].is_met)


def _show(result: SweepResult, summary: dict[str, Any], said: list[str], console: Console) -> None:
    from moe_dist.search.trials import rank_trials

    from ..search.results import MAX_ROWS, table_lines

    metric, mode = next(iter(result.config.search.wanted.items()))
    ranked = rank_trials(list(result.trials.values()), metric, mode)
    for line in table_lines(ranked[:MAX_ROWS], summary):
        console.result(line)
    for line in said:
        console.result(line)
    shown = result.files.shown
    console.result(f"\nreport: {shown(result.directory / 'report.md')}")
    if summary["best"] is not None:
        console.result(f"recipe: {shown(result.directory / 'best.yaml')}")
    if result.open_hint:
        console.result(f"MLflow: {result.open_hint}")


def _answer(result: SweepResult, goals: Any, minimize: str) -> Answer:
    from ..search.frontier import answer_goal, measure_again

    again = measure_again(result, goals) if minimize == "latency" else {}
    return answer_goal(result, goals, minimize, again)
