"""Digests of what a stage reads, so that an unchanged stage is recognised and skipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_dist.digests import file_digest

MANIFEST = "manifest.json"
"""Of a saved model: lists its files with their hashes."""
STAGE_FORMAT = 2
"""Raised when a stage writes something else for the same settings."""


def file_size(path: Path) -> int | None:
    """Return a file's size in bytes; None if it is not there."""
    return path.stat().st_size if path.is_file() else None


def path_digest(path: Path, size_of: Callable[[Path], int | None] = file_size) -> str:
    """Return one digest for a file, a saved model or any other directory.

    A model directory is identified by the hashes in its manifest, which `load_model` verifies
    against the files; other directories by their files' names and contents.

    Args:
        path: a file or directory that exists.
        size_of: measures the files that a manifest lists, which may lie elsewhere.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: if the path, or a file that a manifest lists, is not there whole.
    """
    if path.is_file():
        return file_digest(path)
    manifest = path / MANIFEST
    if manifest.is_file():
        files = json.loads(manifest.read_text(encoding="utf-8")).get("files", {})
        for name, entry in files.items():
            listed = path / name
            if size_of(listed) != entry.get("bytes"):
                raise FileNotFoundError(f"{listed} is missing or cut short")
        return value_digest({name: entry["sha256"] for name, entry in files.items()})
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there")
    files = sorted(child for child in path.rglob("*") if child.is_file())
    return value_digest({str(child.relative_to(path)): file_digest(child) for child in files})


def value_digest(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of what JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def stage_fingerprint(stage: str, *, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return 64 hexadecimal digits that identify a stage's result.

    `settings` is the part of the configuration that the stage reads, `inputs` each input's
    digest.
    """
    return value_digest(
        {
            "format": STAGE_FORMAT,
            "stage": stage,
            "settings": dict(settings),
            "inputs": dict(inputs),
        }
    )
