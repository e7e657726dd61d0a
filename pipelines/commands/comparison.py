"""The commands `runs`, `report`, `seeds` and `benchmark tracking`."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.whole_files import whole_file

from .command_line import Debug, clean_errors, quieten_libraries

DEFAULT_URI = "sqlite:///mlflow.db"
REPORT_NAME = "runs.html"

TrackingUri = Annotated[
    str,
    typer.Option(
        "--uri",
        help="MLflow tracking URI; when empty MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.",
    ),
]
Experiment = Annotated[str, typer.Option(help="Only runs of this experiment.")]


def register(app: typer.Typer, benchmark_app: typer.Typer) -> None:
    """Add the commands to the program and its benchmarks."""
    app.command("runs")(runs)
    app.command("report")(report)
    app.command("seeds")(seeds)
    benchmark_app.command("tracking")(benchmark_tracking)


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Compare these: ids, names or directories."),
    ] = None,
    uri: TrackingUri = "",
    experiment: Experiment = "",
    where: Annotated[
        str,
        typer.Option(
            "--filter",
            help="MLflow's search, e.g. \"metrics.retention > 0.98 and tags.router = "
            "'token_gate'\".",
        ),
    ] = "",
    sort: Annotated[
        str, typer.Option(help="A metric, parameter or tag, or name, status, started.")
    ] = "started",
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 30,
    everything: Annotated[
        bool, typer.Option("--all", help="Show stages and trials too, below their runs.")
    ] = False,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another metric, parameter or tag; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the runs of an MLflow store, or compare some of them."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.whole_files import finite

        from ..console import Console
        from ..report.listing import (
            Listing,
            comparison_json,
            comparison_tables,
            list_runs,
            list_tables,
        )
        from ..report.selection import select_runs

        console = Console()
        store = tracking_uri(uri)
        if names:
            views = select_runs(names, uri=store, experiment=experiment)
            if as_json:
                typer.echo(json.dumps(finite(comparison_json(views)), indent=1))
                return
            for table in comparison_tables(views):
                console.result(table)
            return
        listing = Listing(
            where=where,
            sort=sort,
            ascending=ascending,
            limit=limit,
            everything=everything,
            columns=tuple(column or ()),
        )
        found = list_runs(store, experiment, listing)
        if as_json:
            typer.echo(json.dumps(finite([entry.as_plain() for entry in found]), indent=1))
            return
        for table in list_tables(found, listing):
            console.result(table)


def report(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Ids, names or output directories.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path(REPORT_NAME),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Runs compared",
    uri: TrackingUri = "",
    experiment: Experiment = "",
    debug: Debug = False,
) -> None:
    """Write one HTML page that compares runs; it loads nothing and can be sent."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from ..report.page import render_page
        from ..report.selection import select_runs

        views = select_runs(names, uri=tracking_uri(uri), experiment=experiment)
        page = render_page(views, title)
        write_page(page, output)
        typer.echo(f"{output}: {len(views)} runs, {len(page.encode()) / 1e6:.2f} MB")


def seeds(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Finished runs: OUTPUT_DIR/NAME.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="Compare all models with this one (teacher, student, or a name of `compare`); "
            "repeatable. By default `dense` where every run has it, else the teacher.",
        ),
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="Compare the students before their distillation.")
    ] = False,
    measure: Annotated[
        str,
        typer.Option(
            help="quality: the task's main metric; hidden_error or prediction_error: how far "
            "students are from their teacher, which tells them apart sooner."
        ),
    ] = "quality",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the table here too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Compare models over runs that differ in their seed, on one task or several."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.errors import ConfigError

        from ..report.nearness import MEASURES
        from ..report.seeded_runs import read_runs
        from ..report.seeds import compare_seeds
        from ..report.seeds_table import to_markdown, to_plain

        counts = Counter(path.resolve() for path in directories)
        faults = [
            f"{path} is named {count} times; name each run once, since each counts as a seed."
            for path, count in counts.items()
            if count > 1
        ]
        if measure not in ("quality", *MEASURES):
            known = f"quality, {' or '.join(MEASURES)}"
            faults.append(f"--measure={measure} is not known; use {known}.")
        if faults:
            raise ConfigError(faults, source="seeds")
        chosen = None if measure == "quality" else measure
        found = [
            run for path in directories for run in read_runs(path, before=before, measure=chosen)
        ]
        rows = compare_seeds(found, against or ())
        table = to_markdown(rows)
        if output is not None:
            write_page(table, output)
        plain = [to_plain(row) for row in rows]
        typer.echo(json.dumps(plain, indent=1) if as_json else table)


def benchmark_tracking(
    num_runs: Annotated[int, typer.Option("--runs", help="Runs of all processes.")] = 200,
    processes: Annotated[int, typer.Option(help="Processes that log at once.")] = 8,
    steps: Annotated[int, typer.Option(help="Lines of each run's metric log.")] = 50,
    directory: Annotated[Path | None, typer.Option(help="Where to write, then kept.")] = None,
    debug: Debug = False,
) -> None:
    """Log runs from many processes at once, count what is lost, and time a report on 100 runs."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from ..benchmarks.tracking import TrackingBenchmark, main

        main(
            TrackingBenchmark(
                num_runs=num_runs, num_processes=processes, num_steps=steps, directory=directory
            )
        )


def tracking_uri(given: str) -> str:
    """Choose the store's URI as a recipe does, unless one is given on the command line."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def write_page(page: str, path: Path) -> None:
    """Write a page, whole or not at all; its directory is made."""
    with whole_file(path) as beside:
        beside.write_text(page, encoding="utf-8")
