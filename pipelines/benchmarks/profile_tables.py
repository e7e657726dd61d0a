"""Tables of where time goes, for the console, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..markdown import markdown_table
from .results import write_results

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_OPERATORS = 15


@dataclass(frozen=True)
class Share:
    """What one part or operator takes.

    Attributes:
        name: of it.
        ms: milliseconds of a pass or step.
        share: of all of them.
        calls: of a pass or step.
    """

    name: str
    ms: float
    share: float
    calls: float


def shares(times: Mapping[str, float], calls: Mapping[str, float]) -> tuple[Share, ...]:
    """Put times in order, longest first, each with its share of all."""
    whole = sum(times.values()) or 1.0
    found = (Share(name, ms, ms / whole, calls.get(name, 0.0)) for name, ms in times.items())
    return tuple(sorted(found, key=lambda one: -one.ms))


def show(
    title: str,
    tables: Mapping[str, Sequence[Share]],
    remarks: Sequence[str],
    report: DataclassInstance,
    output: Path | None,
) -> None:
    """Print tables and remarks, and write them where a directory is given.

    Args:
        title: what they are of.
        tables: by what their rows are.
        remarks: sentences below them.
        report: the same for programs.
        output: a directory for profile.json and profile.md; the trace lies there already.
    """
    console = Console(highlight=False)
    console.print(escape(title))
    for kind, rows in tables.items():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in _headings(kind):
            table.add_column(heading, justify="left" if heading == kind else "right")
        for row in rows:
            table.add_row(*map(escape, _cells(row)))
        console.print(table)
    for remark in remarks:
        console.print(escape(remark))
    if output is None:
        console.print("--output DIR writes this as JSON and Markdown, and a trace")
        return
    lines = [f"# {title}", ""]
    for kind, rows in tables.items():
        lines += [*markdown_table(_headings(kind), map(_cells, rows)), ""]
    lines += [f"- {remark}" for remark in remarks]
    write_results(output, "profile", report, "\n".join(lines) + "\n")
    console.print(f"written to {output}; open trace.json in ui.perfetto.dev or chrome://tracing")


def _headings(kind: str) -> list[str]:
    return [kind, "ms", "%", "calls"]


def _cells(row: Share) -> list[str]:
    return [row.name, f"{row.ms:.2f}", f"{100 * row.share:.1f}", f"{row.calls:.0f}"]
