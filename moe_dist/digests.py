"""The digest by which files are recognised and damage is found."""

from __future__ import annotations

import hashlib
from pathlib import Path

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Ends of names, in small letters, of files that could run code when they are loaded."""


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
