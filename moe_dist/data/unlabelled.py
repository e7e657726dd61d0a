"""Rows without labels, which join those that a student is distilled on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from moe_dist.data.cache import build_once, default_cache_dir
from moe_dist.data.files import Texts
from moe_dist.data.reading import missing_unlabelled, read_split
from moe_dist.data.rows import Say
from moe_dist.data.samples import Sample, check_rows
from moe_dist.data.splits import find_repeats
from moe_dist.data.tasks import TaskSpec
from moe_dist.errors import DataError

_RESULT = "repeats.json"
_RULES = 1
"""Raised when texts are compared otherwise."""


def read_unlabelled(
    places: Sequence[str | Path],
    task: TaskSpec,
    *,
    column_names: Sequence[str] | None,
    first_id: int,
    dev: Sequence[Sample],
    withheld: Sequence[Sample],
    say: Say,
    texts: Texts | None = None,
    cache_dir: Path | None = None,
) -> tuple[list[Sample], dict[str, int]]:
    """Read rows of which only the texts count, without those that say what others are measured on.

    Args:
        places: files, or directories of their parts.
        task: with its label names resolved.
        column_names: of files without a header line.
        first_id: number of the first row, beyond those of the training rows.
        dev: the dev rows.
        withheld: the rows that recipes are chosen on.
        say: is told what was guessed.
        texts: how text files are read; None reads them as TSV.
        cache_dir: where it is kept which rows repeat others; None for `default_cache_dir`.

    Returns:
        The samples, and the number of rows left out by the reason.

    Raises:
        DataError: if a file is missing, has a row that cannot be used, or no row is left.
    """
    missing = missing_unlabelled(places)
    if missing:
        raise DataError(
            f"no such data file: {' and '.join(missing)}",
            remedy="name your files there; paths are relative to the working directory",
        )
    rows = [row for place in places for row in read_split(place, column_names, say, texts).rows]
    samples, _ = check_rows(rows, task, needs_labels=False)
    left_out = {}
    for reason, others in (
        ("that repeat dev rows", dev),
        ("that repeat those withheld", withheld),
    ):
        dropped = _repeats(samples, others, cache_dir, apart=not task.task_kind.reads_pairs)
        samples = [sample for row, sample in enumerate(samples) if row not in dropped]
        left_out[reason] = len(dropped)
    if not samples:
        raise DataError(
            f"data.unlabelled={', '.join(map(str, places))} gives no rows"
            + (" but those that repeat dev rows" if any(left_out.values()) else ""),
            remedy="give other texts, or remove it",
        )
    num_open = sum(not sample.label for sample in samples) if task.label == "text" else 0
    if num_open:
        say(
            f"{num_open} of {len(samples)} unlabelled rows have no target: of the tokens that are "
            "written, the first alone is compared there"
        )
    return [sample.numbered(first_id + sample.sample_id) for sample in samples], left_out


def _repeats(
    samples: Sequence[Sample], others: Sequence[Sample], cache_dir: Path | None, *, apart: bool
) -> set[int]:
    """Rows that say what another says, or nearly; found once for all processes that read them.

    `apart` compares the two texts of a row each by itself, as they are read.
    """
    if not others:
        return set()
    own, known = (
        [(row, text) for row, s in enumerate(side) for text in (s.texts if apart else [s.text])]
        for side in (samples, others)
    )
    texts, references = ([text for _, text in side] for side in (own, known))
    key = hashlib.sha256(json.dumps([_RULES, texts, references]).encode()).hexdigest()

    def find(folder: Path) -> None:
        found = find_repeats(texts, references)
        (folder / _RESULT).write_text(json.dumps([*found.exact, *found.near]), encoding="utf-8")

    folder = build_once(
        (cache_dir or default_cache_dir()) / "unlabelled-repeats" / key,
        find,
        is_good=lambda path: (path / _RESULT).is_file(),
    )
    repeats = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
    return {own[place][0] for place in repeats}
