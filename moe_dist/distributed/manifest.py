"""Digests of a directory's files, so that damage is found and named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_dist.digests import PICKLES, file_digest
from moe_dist.errors import CheckpointError
from moe_dist.moe.digests import by_layer
from moe_dist.whole_files import write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_REMEDY = "use another checkpoint, or delete this one and train again from the one before"


def write_manifest(directory: Path, experts: Mapping[str, str]) -> None:
    """Write the manifest over all files of a directory, and flush it to disk.

    Args:
        directory: whose other files are complete.
        experts: digests by `<layer>.<global expert>`.
    """
    files = {
        path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST
    }
    manifest = {"format_version": FORMAT_VERSION, "files": files, "experts": dict(experts)}
    write_json(directory / MANIFEST, manifest)


def check_manifest(directory: Path) -> None:
    """Check every file of a directory against its manifest.

    Args:
        directory: a checkpoint.

    Raises:
        CheckpointError: naming the first missing, damaged or unsafe file.
    """
    files = _read_files(directory / MANIFEST)
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() in PICKLES:
            raise CheckpointError(
                f"{path} may be a pickle, which could run code when loaded",
                remedy="remove the file; checkpoints of moe-dist are safetensors and JSON only",
            )
        if path.name != MANIFEST and path.name not in files:
            raise CheckpointError(
                f"{path} is not in the manifest", remedy="remove the file if it is not needed"
            )
    for name, (expected_digest, expected_size) in files.items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing", remedy=_REMEDY)
        size = path.stat().st_size
        if size != expected_size:
            raise CheckpointError(
                f"{path} is damaged: {size} bytes instead of {expected_size}", remedy=_REMEDY
            )
        if file_digest(path) != expected_digest:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}", remedy=_REMEDY
            )


def _read_files(path: Path) -> dict[str, tuple[str, int]]:
    """Read each file's digest and size from a manifest, which may be damaged too."""
    manifest = read_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, not {FORMAT_VERSION}",
            remedy="load it with the release of moe-dist that wrote it",
        )
    try:
        by_layer(manifest["experts"])
        return {
            name: (str(entry["sha256"]), int(entry["bytes"]))
            for name, entry in manifest["files"].items()
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}", remedy=_REMEDY) from error


def read_experts(directory: Path) -> dict[str, str]:
    """Read digests by `<layer>.<global expert>` from a manifest known to be good."""
    experts = read_json(directory / MANIFEST).get("experts", {})
    return {str(key): str(digest) for key, digest in experts.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; CheckpointError if missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", remedy=_REMEDY) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", remedy=_REMEDY) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object", remedy=_REMEDY)
    return value
