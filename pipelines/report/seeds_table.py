"""The rows of `moe-dist seeds` for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_dist.whole_files import finite

from ..console import UNDEFINED
from ..markdown import markdown_table
from .seeds import MEAN, Row

# Of figures in hundredths, and of others.
_DIGITS = {True: ".1f", False: ".3f"}


def to_markdown(rows: Sequence[Row]) -> str:
    """Write the rows as a Markdown table, and below it units and what its intervals are."""
    references = list(dict.fromkeys(name for row in rows for name in row.differences))
    has_before = any(row.before is not None for row in rows)
    quality = ["before", "after"] if has_before else ["quality"]
    head = ["task", "model", "seeds", "FFN FLOPs", *quality, "retention"]
    for name in references:
        head += [f"minus {name} (95 %)", "bootstrap", "t over seeds"]
    table = []
    for row in rows:
        spread = "" if row.spread is None else f" ± {_scaled(row.spread, row)}"
        cells = [
            row.task,
            row.label,
            str(row.num_seeds),
            "" if row.flops_ratio is None else f"× {row.flops_ratio:.3f}",
            *([_scaled(row.before, row)] if has_before else []),
            f"{_scaled(row.quality, row)}{spread}",
            _retention(row),
        ]
        for name in references:
            cells += _told(row, name)
        table.append(cells)
    lines = markdown_table(head, table)
    return "\n".join([*lines, *(f"\n{note}" for note in _notes(rows))]) + "\n"


def to_plain(row: Row) -> dict[str, Any]:
    """Give a row as what JSON can hold."""
    plain: dict[str, Any] = finite(asdict(row))
    return plain


def _scaled(value: float | None, row: Row) -> str:
    if value is None:
        return ""
    return UNDEFINED if math.isnan(value) else f"{row.scale * value:{_DIGITS[row.in_hundredths]}}"


def _retention(row: Row) -> str:
    if row.retention is None:
        return "" if row.undefined is None else UNDEFINED
    return f"{row.retention:.3f}"


def _told(row: Row, reference: str) -> list[str]:
    """The difference with the wider interval, and both of which that is one."""
    if reference not in row.differences:
        return ["", "", ""]
    interval = row.differences[reference]
    if interval is None:
        return [UNDEFINED, "", ""]
    digits = f"+{_DIGITS[row.in_hundredths]}"

    def ends(low: float, high: float) -> str:
        return f"{row.scale * low:{digits}} to {row.scale * high:{digits}}"

    difference = f"{row.scale * interval.difference:{digits}} ({ends(interval.low, interval.high)})"
    over_seeds = "one training run" if interval.over_seeds is None else ends(*interval.over_seeds)
    return [difference, ends(*interval.bootstrap), over_seeds]


def _notes(rows: Sequence[Row]) -> list[str]:
    """What the table cannot say of its intervals."""
    found = [one for row in rows for one in row.differences.values() if one is not None]
    measured = [row for row in rows if row.task != MEAN]
    notes = []
    for in_hundredths, unit in ((True, ", in hundredths"), (False, "")):
        titles = dict.fromkeys(
            f"{row.metric} ({row.task}{'' if row.higher_is_better else '; lower is better'})"
            for row in measured
            if row.in_hundredths == in_hundredths
        )
        notes += [f"Quality: {', '.join(titles)}{unit}."] if titles else []
    if len({row.task for row in measured}) > 1 and len(measured) == len(rows):
        notes.append("These metrics have no mean: they differ in direction or unit.")
    notes += list(dict.fromkeys(f"{row.undefined}." for row in rows if row.undefined))
    if any(one.over_seeds is not None for one in found):
        notes.append(
            "Intervals: the wider one of the paired bootstrap over dev rows and seeds and of "
            "Student's t over seeds; with two or three seeds the bootstrap alone covers too little."
        )
    if any(one.over_seeds is None for one in found):
        notes.append(
            "Where one training run of each model stands behind an interval, it knows the dev rows "
            "and nothing of other seeds: a difference may be the luck of that run."
        )
    left_out = max((one.num_undefined for one in found), default=0)
    if left_out:
        notes.append(
            f"Up to {left_out} resamples on which a metric is undefined are left out of a "
            "bootstrap."
        )
    return notes
