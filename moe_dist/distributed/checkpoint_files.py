"""A run's checkpoint directories: written beside and renamed, listed, pruned.

At every moment the newest complete checkpoint lies under a name that `list_checkpoints` returns:

    step-00000120            a complete checkpoint
    .replaced-step-00000120  the one before at the same step, for as long as the new one is not in
    .unfinished-*            being written
    .discarded-*             being deleted
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.distributed.manifest import write_manifest
from moe_dist.errors import CheckpointError, is_full_disk
from moe_dist.whole_files import flush_to_disk, write_json

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "state.json"

_NAME = re.compile(r"(?:\.replaced-)?step-(\d{8,})")
_REPLACED, _UNFINISHED, _DISCARDED = ".replaced-", ".unfinished-", ".discarded-"


def step_directory(directory: Path, step: int) -> Path:
    """Return where a step's checkpoint lies."""
    return directory / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Read a checkpoint's step from its name; None if this is no checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, newest first."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    # Sorted by name first, so that a proper checkpoint hides the one it has replaced.
    found = {step_of(path): path for path in sorted(directory.iterdir())}
    return [found[step] for step in sorted((s for s in found if s is not None), reverse=True)]


def write_checkpoint(
    target: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    state: Mapping[str, Any],
    experts: Mapping[str, str],
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        target: where it will lie; a checkpoint that is there is replaced.
        tensors: what each safetensors file holds.
        state: for `state.json`.
        experts: digests by `<layer>.<global expert>`.

    Raises:
        CheckpointError: if it could not be written; what was there before is untouched.
    """
    unfinished = target.with_name(f"{_UNFINISHED}{target.name}-{secrets.token_hex(4)}")
    try:
        _clear(target.parent, _UNFINISHED, _DISCARDED)
        unfinished.mkdir(parents=True)
        for name, values in tensors.items():
            save_file(values, unfinished / name)
            flush_to_disk(unfinished / name)
        write_json(unfinished / STATE_FILE, state, keeps_nan=True)
        write_manifest(unfinished, experts)
        flush_to_disk(unfinished)
        _put_in_place(unfinished, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = "the disk is full: " if is_full_disk(error) else ""
        raise CheckpointError(
            f"{target} could not be written: {reason}{error}",
            remedy="free space or fix the rights there, then start the same command again; "
            "older checkpoints are untouched",
        ) from error


def prune_checkpoints(
    directory: Path, step: int, *, keep: int, abandoned: Collection[int] = ()
) -> None:
    """Remove what is no longer needed, once the checkpoint of a step is in place.

    Args:
        directory: of the run's checkpoints.
        step: of the newest good checkpoint, which always stays; later ones belong to a
            trajectory of training that was left.
        keep: how many stay, the newest included.
        abandoned: earlier steps that belong to such a trajectory too.
    """
    steps = {path: step_of(path) or 0 for path in list_checkpoints(directory)}
    left = [path for path, of in steps.items() if of > step or (of in abandoned and of != step)]
    current = [path for path in steps if path not in left]
    for path in left + current[max(1, keep) :]:
        _discard(path)
    for replaced in directory.glob(f"{_REPLACED}*"):
        if replaced not in steps:
            _discard(replaced)
    _clear(directory, _UNFINISHED, _DISCARDED)


def _put_in_place(finished: Path, target: Path) -> None:
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    if target.exists():
        # A directory cannot be replaced in one step. Between the two renames the old one is still
        # found, as `.replaced-*`.
        _discard(replaced)
        os.rename(target, replaced)
    os.rename(finished, target)
    flush_to_disk(target.parent)
    _discard(replaced)


def _discard(path: Path) -> None:
    """Delete a directory in such a way that no part of it is ever taken for a checkpoint."""
    discarded = path.with_name(f"{_DISCARDED}{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, discarded)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
        return
    shutil.rmtree(discarded, ignore_errors=True)


def _clear(directory: Path, *prefixes: str) -> None:
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name.startswith(prefixes):
            shutil.rmtree(path, ignore_errors=True)
