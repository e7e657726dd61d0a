"""The commands that run stages: with progress for people, or JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line import clean_errors, quieten_libraries, shown_warnings

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from ..chain.chain import ChainResult
    from ..console import Console


def run_until(
    stage: str,
    recipe: Path,
    overrides: list[str] | None,
    *,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Run the chain up to a stage, as its command does; a dry run prints the derived sizes only."""
    with clean_errors(debug=debug):
        quieten_libraries()
        with open_console(quiet=quiet, as_json=as_json) as console:
            _run_until(stage, recipe, overrides or [], console, dry_run=dry_run)


@contextmanager
def open_console(*, quiet: bool, as_json: bool) -> Iterator[Console]:
    """Open what shows progress and results, as text or JSON lines; when quiet, no progress."""
    if as_json:
        from ..json_console import json_console

        with json_console(quiet=quiet) as json_lines, shown_warnings(json_lines):
            yield json_lines
        return
    from ..console import Console

    console = Console(quiet=quiet)
    with shown_warnings(console):
        yield console


def _run_until(
    stage: str, recipe: Path, overrides: list[str], console: Console, *, dry_run: bool
) -> None:
    from moe_dist.config import load_config
    from moe_dist.timeline import mark

    config = load_config(recipe, overrides)
    mark("command line and recipe")
    if dry_run:
        from ..checks.sizes import show_sizes

        show_sizes(config, console)
        return
    from ..checks.cluster_package import cluster_module

    lasting = cluster_module("lasting")
    if lasting.in_ray_job():
        lasting.check_job(config)
    _run(stage, config, console)


def _run(stage: str, config: RunConfig, console: Console) -> None:
    import signal

    from ..chain.chain import run_chain

    # A stop from outside ends a run as Ctrl-C does: noted as killed, Ray taken down, to be resumed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = run_chain(config, console, until=stage)
    document = _document(result)
    console.document(document, lambda: _show(result, console))
    report: Any = document.get("report")
    if report is not None:
        from ..report.pays import check_requirement
        from ..stages import evaluate

        # At the very end, so that nothing is lost by it.
        evaluated = result.shown(result.results[evaluate.NAME].directory)
        check_requirement(report, str(document["path"]), evaluated)


def _document(result: ChainResult) -> dict[str, object]:
    """Give what a program wants to know at the end."""
    if result.report_path is not None:
        report: dict[str, object] = json.loads(result.report_path.read_text(encoding="utf-8"))
        return {
            "event": "report",
            "path": result.shown(result.report_path),
            "report": report,
            "mlflow": result.open_hint,
        }
    last = list(result.results.values())[-1]
    return {
        "event": "finished",
        "stage": last.stage,
        "outputs": {name: result.shown(path) for name, path in last.outputs.items()},
        "metrics": dict(last.metrics),
        "mlflow": result.open_hint,
    }


def _show(result: ChainResult, console: Console) -> None:
    if result.report_path is not None:
        from ..report.report_text import (
            latency_lines,
            nearness_lines,
            pays_lines,
            to_tables,
            undefined_lines,
            verdict_lines,
        )

        report = json.loads(result.report_path.read_text(encoding="utf-8"))
        for table in to_tables(report):
            console.result(table)
        lines = (
            *undefined_lines(report),
            *verdict_lines(report),
            *nearness_lines(report),
            *latency_lines(report),
            *pays_lines(report),
        )
        for line in lines:
            console.result(line)
        console.result(f"\nreport: {result.shown(result.report_path)}")
    else:
        last = list(result.results.values())[-1]
        for name, path in last.outputs.items():
            console.result(f"{name}: {result.shown(path)}")
    if result.open_hint:
        console.result(f"MLflow: {result.open_hint}")
