"""A row as its file holds it, with the place to name where something is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_dist.errors import DataError

# A row is its line in the file and its values by column.
Row = tuple[int, dict[str, Any]]
Say = Callable[[str], None]
"""Takes one line about what was guessed or may be wrong."""


class SourceRow(NamedTuple):
    """A row of a data set that may lie in several files.

    Attributes:
        origin: the file, or what stands for it.
        line: 1-based; the row's number where the format has no lines.
        values: by column.
    """

    origin: Path
    line: int
    values: dict[str, Any]

    def error(self, message: str, remedy: str) -> DataError:
        """The error for this row, which begins with its file and line."""
        return row_error(self.origin, self.line, message, remedy)


def row_error(path: Path, line: int, message: str, remedy: str) -> DataError:
    """The error for one row of a file; `line` is 1-based."""
    return DataError(f"{path}, line {line}: {message}", remedy=remedy)


def is_number(value: Any) -> bool:
    """Whether a value is, or is written as, a finite number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
