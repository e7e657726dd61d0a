"""Directories that a process makes for something that may come to nothing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


class MadeDirectories:
    """Remembers what was made, so that what was there before is left alone."""

    def __init__(self) -> None:
        self._made: list[Path] = []

    def make(self, directory: Path) -> None:
        """Make a directory, which may exist, and those above it."""
        missing = [place for place in (directory, *directory.parents) if not place.exists()]
        for place in reversed(missing):
            with suppress(FileExistsError):  # Another process makes it at this moment.
                place.mkdir()
                self._made.append(place)

    def remove_if_empty(self) -> None:
        """Take away again what was made, as far as nothing was written into it."""
        while self._made:
            try:
                self._made.pop().rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                self._made.clear()
