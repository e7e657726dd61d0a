"""Three rows of two classes in TSV files, and whatever a test changes about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_dist.data.sources import Splits, load_splits

Rows = Sequence[tuple[str, ...]]
ROWS = [("one good film", "pos"), ("a bad plot", "neg"), ("fine acting here", "pos")]


def write_tsv(path: Path, rows: Rows, header: tuple[str, ...]) -> Path:
    lines = ["\t".join(row) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load(folder: Path, rows: Rows = ROWS, **changes: Any) -> Splits:
    header = changes.pop("header", ("text", "label"))
    dev_rows = changes.pop("dev_rows", rows)
    arguments: dict[str, Any] = {
        "source": "files",
        "train": write_tsv(folder / "train.tsv", rows, header),
        "dev": write_tsv(folder / "dev.tsv", dev_rows, header),
        "text_columns": ["text"],
    }
    return load_splits(**(arguments | changes))
