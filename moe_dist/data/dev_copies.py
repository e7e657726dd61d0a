"""How many dev rows nearly repeat a training row, counted once for the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.data.cache import build_once, default_cache_dir
from moe_dist.data.splits import find_repeats

if TYPE_CHECKING:
    from datasets import Dataset

    from moe_dist.data.sources import Splits

_RESULT = "num_near_copies.json"
_RULES = 1
"""Raised when texts are compared otherwise."""


def num_near_copies(splits: Splits, cache_dir: Path | None = None) -> int:
    """Count the dev rows that are near copies of training rows, exact ones left out.

    Args:
        splits: dev rows that were held out have none.
        cache_dir: where the count is kept; None for `default_cache_dir`.

    Returns:
        Their number.

    Raises:
        DataError: if the cache cannot be written.
    """
    if splits.is_held_out:
        return 0

    def count(folder: Path) -> None:
        found = find_repeats(_texts(splits.dev), _texts(splits.train))
        (folder / _RESULT).write_text(json.dumps(len(found.near)), encoding="utf-8")

    cache = (cache_dir or default_cache_dir()) / "near-copies"
    folder = build_once(
        cache / f"{splits.digest}-{_RULES}", count, is_good=lambda path: (path / _RESULT).is_file()
    )
    number: int = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
    return number


def _texts(rows: Dataset) -> list[str]:
    pairs = zip(rows["text_a"], rows["text_b"], strict=True)
    return [first if second is None else f"{first}\n{second}" for first, second in pairs]
