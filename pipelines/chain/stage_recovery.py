"""An earlier result stays beside a new attempt until that attempt has something to show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import StorageError
from moe_dist.whole_files import PARTIAL

if TYPE_CHECKING:
    from .files import ResultFiles

FINISHED = "stage.json"
STARTED = "started.json"
_CHECKPOINTS = "checkpoints/step-*"
# All that a process stopped in its first moment may have left.
_FIRST_FILES = frozenset({STARTED + PARTIAL})


def recover(directory: Path, fingerprint: str, files: ResultFiles) -> None:
    """Tidy what a stopped process left beside a stage's directory.

    The earlier result is put back where the attempt after it left no checkpoint, or where it is
    itself the one that is wanted; it goes where the attempt finished.
    """
    previous = _previous(directory)
    for path in (directory, previous):
        shutil.rmtree(_removed(path), ignore_errors=True)
    if not previous.exists():
        return
    if (directory / FINISHED).exists():
        _remove(previous, files)
        return
    is_wanted = (previous / FINISHED).exists() and read_fingerprint(previous) == fingerprint
    if not holds_foreign_files(directory) and (is_wanted or not _has_checkpoint(directory)):
        _put_back(directory, files)


def stage_of(path: Path) -> Path | None:
    """The directory of the finished stage that made a model; None of one from elsewhere.

    Nothing else belongs there, since it is cleared when the stage is done again.
    """
    return next((above for above in path.parents if (above / FINISHED).is_file()), None)


def set_aside(directory: Path, files: ResultFiles) -> None:
    """Clear a stage's directory; a result or checkpoints in it are kept beside it."""
    has_worth = (directory / FINISHED).exists() or _has_checkpoint(directory)
    # A result that is kept already is worth more than an attempt that came after it.
    if has_worth and not _previous(directory).exists():
        directory.rename(_previous(directory))
        files.moved(directory, _previous(directory))
    else:
        _remove(directory, files)


def discard_previous(directory: Path, files: ResultFiles) -> None:
    """Remove the earlier result of a stage that has finished."""
    if _previous(directory).exists():
        _remove(_previous(directory), files)


def move_back(directory: Path, files: ResultFiles) -> bool:
    """Put the earlier result back after an attempt that failed before its first checkpoint.

    Returns whether it did: an error of the disk does not hide the one that ended the attempt,
    and the next start tries again.
    """
    if (
        not _previous(directory).exists()
        or (directory / FINISHED).exists()
        or _has_checkpoint(directory)
        or holds_foreign_files(directory)
    ):
        return False
    try:
        _put_back(directory, files)
    except (OSError, StorageError):
        return False
    return True


def holds_foreign_files(directory: Path) -> bool:
    """Say whether a directory holds files and none of them says that a stage wrote them."""
    if not directory.exists() or any((directory / name).exists() for name in (STARTED, FINISHED)):
        return False
    return any(path.name not in _FIRST_FILES for path in directory.iterdir())


def read_started(directory: Path) -> dict[str, Any] | None:
    """Read the newest attempt's `started.json`; None where there is none that can be read."""
    try:
        value = json.loads((directory / STARTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_fingerprint(directory: Path) -> str | None:
    """Read which fingerprint the newest attempt has; None where nothing was started."""
    return (read_started(directory) or {}).get("fingerprint")


def _has_checkpoint(directory: Path) -> bool:
    return any(directory.glob(_CHECKPOINTS))


def _previous(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.previous")


def _removed(directory: Path) -> Path:
    return directory.with_name(f".{directory.name.removeprefix('.')}.removed")


def _put_back(directory: Path, files: ResultFiles) -> None:
    if directory.exists():
        _remove(directory, files)
    _previous(directory).rename(directory)
    files.moved(_previous(directory), directory)


def _remove(directory: Path, files: ResultFiles) -> None:
    # Out of the way in one step: half a directory would look like files of someone else.
    removed = _removed(directory)
    shutil.rmtree(removed, ignore_errors=True)
    directory.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
    files.removed(directory)
