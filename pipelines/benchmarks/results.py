"""Where a benchmark leaves what it found, for programs and for people."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.whole_files import write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_results(directory: Path, name: str, report: DataclassInstance, markdown: str) -> None:
    """Write a report as JSON and Markdown files of that name into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / f"{name}.json", asdict(report))
    (directory / f"{name}.md").write_text(markdown, encoding="utf-8")
