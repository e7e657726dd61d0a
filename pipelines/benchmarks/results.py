"""Where a benchmark leaves what it found, for programs and for people."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.errors import ConfigError
from moe_dist.whole_files import write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from moe_dist.measure.latency import OtherWork


def check_output(output: Path | None) -> None:
    """See that results can be written into a directory; else a ConfigError."""
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError([f"--output {output} is a file; name a directory."], source="--output")


def write_results(directory: Path, name: str, report: DataclassInstance, markdown: str) -> None:
    """Write a report as JSON and Markdown files of that name into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / f"{name}.json", asdict(report))
    (directory / f"{name}.md").write_text(markdown, encoding="utf-8")


def busy_line(work: OtherWork, num_threads: int) -> str:
    """Say what other work there was beside so many threads; nothing where it did not disturb."""
    if not work.disturbs(num_threads):
        return ""
    return (
        f"other work kept {work.busy_cores:.1f} of {work.num_cores} cores busy meanwhile: times "
        "are too high, and ratios a hint"
    )
