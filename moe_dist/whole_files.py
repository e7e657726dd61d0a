"""Files and directories that a reader sees whole or not at all, whenever their writer dies."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_dist.redaction import hide_secrets

PARTIAL = ".partial"
"""Ends the name of a file that is being written."""


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Write a file beside its place and move it there in the end.

    Args:
        path: the file; its directory is made, and a file that is there is replaced.
        durable: the content is on the disk before the file takes its place, so that it outlives
            the machine too, and not only the process.

    Yields:
        Where to write. What is there after an error is removed, and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + PARTIAL)
    try:
        yield beside
        if durable:
            flush_to_disk(beside)
        beside.replace(path)
    except BaseException:
        # What went wrong is worth more than a second error of the same disk.
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Write a directory beside its place and move it there in the end.

    Args:
        path: the directory; parents are made, and what is there is replaced.

    Yields:
        Where to write. What is there after an error is removed, and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield beside
        # safetensors writes for the owner alone; others on shared storage must read it too.
        for entry in (beside, *beside.rglob("*")):
            if entry.is_dir() or entry.stat().st_nlink == 1:  # A linked file is another's, too.
                entry.chmod((0o777 if entry.is_dir() else 0o666) & ~_umask())
        _put_in_place(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: Path, value: Any, *, keeps_nan: bool = False) -> None:
    """Write a JSON file whole or not at all, without credentials, and make its directory.

    With `keeps_nan`, NaN is written as Python alone reads it; else it becomes null.
    """
    text = json.dumps(value if keeps_nan else finite(value), indent=2, default=os.fspath)
    with whole_file(path, durable=True) as beside:
        beside.write_text(hide_secrets(text) + "\n", encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Ask the system to write a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """Copy plain values, with None in place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _put_in_place(finished: Path, target: Path) -> None:
    if not target.exists():
        finished.rename(target)
        return
    # A directory cannot be replaced in one step; the old one stays whole until the new one is in.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        finished.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
