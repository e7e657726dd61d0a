"""What the data hold, said before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_dist.data.summary import DataSummary

    from ..console import Console

MANY_ROWS = 20_000
"""From so many on, tokenising them takes long enough to say so."""


def say_summaries(summaries: Mapping[str, DataSummary], console: Console) -> None:
    """Say in one line what each task's data hold, and warn of what may be wrong with them.

    The name of a task that is the only one is empty.
    """
    for task, summary in summaries.items():
        name = data_heading(task)
        console.note(f"{name}: {summary.line}")
        for note in summary.notes:
            console.note(f"{name}: {note}")
        for warning in summary.warnings:
            console.warn(f"{name}: {warning}")


def data_heading(task: str) -> str:
    """Name a task's data; those of the one task have no name of their own."""
    return f"data of {task}" if task else "data"
