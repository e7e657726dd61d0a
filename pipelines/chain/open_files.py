"""The results of a run, wherever its `output_dir` lies."""

from __future__ import annotations

from pathlib import Path

from .files import ResultFiles
from .mirror import MirroredFiles


def open_files(location: Path | str) -> ResultFiles:
    """Keep results in a directory, or at a URI given as text; nothing is read or written yet."""
    return MirroredFiles(location) if isinstance(location, str) else ResultFiles(location)
