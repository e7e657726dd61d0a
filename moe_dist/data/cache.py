"""A cache that two processes may fill at once and that never holds half a result."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from moe_dist.digests import file_digest
from moe_dist.errors import DataError, is_full_disk

_LOCK_TIMEOUT_S = 900.0
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_ABANDONED_AFTER_S = 24 * 3600.0
_BUILDING = ".building-"


def default_cache_dir() -> Path:
    """The cache's folder: `MOE_DIST_CACHE`, else `moe-dist` in the XDG cache."""
    given = os.environ.get("MOE_DIST_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache").absolute() / "moe-dist"


def build_once(
    final: Path, build: Callable[[Path], None], *, is_good: Callable[[Path], bool]
) -> Path:
    """Return a cached folder, and build it first where it is missing or damaged.

    The folder is built beside its place and renamed, under a lock, so that a reader sees all of
    it or nothing, and of two processes one builds while the other waits.

    Args:
        final: where the folder belongs.
        build: fills the empty folder that it is given.
        is_good: tells whether an existing folder is whole.

    Returns:
        `final`.

    Raises:
        DataError: if the cache cannot be written, its disk is full, or another process holds
            the lock for a quarter of an hour.
    """
    from filelock import FileLock, Timeout

    if final.is_dir() and is_good(final):
        return final
    with _clear_disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(final.parent / f".{final.name}.lock", timeout=_LOCK_TIMEOUT_S)
        try:
            with lock:
                if not (final.is_dir() and is_good(final)):
                    _build_beside(final, build)
        except Timeout as error:
            raise DataError(
                f"another process has been preparing {final} for more than "
                f"{_LOCK_TIMEOUT_S / 60:.0f} minutes",
                remedy="wait for it or stop it, then run the same command again",
            ) from error
    return final


def note_digests(folder: Path, name: str, version: int) -> None:
    """Write the digests of a folder's files into one more, by which `is_whole` finds damage."""
    digests = {path.name: file_digest(path) for path in folder.iterdir()}
    (folder / name).write_text(json.dumps({"format": version, "files": digests}))


def is_whole(folder: Path, name: str, version: int) -> bool:
    """Tell whether all files are there as `note_digests` saw them, and of this version."""
    try:
        meta = json.loads((folder / name).read_text())
        return meta["format"] == version and all(
            file_digest(folder / file) == digest for file, digest in meta["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def clear_abandoned(parent: Path, name: str = "*") -> None:
    """Remove what killed processes were building in a folder of the cache.

    With a name, only for that entry.
    """
    for abandoned in parent.glob(f".{name}{_BUILDING}*"):
        # Left by a process that was killed; the age keeps us safe where locks do not work.
        with suppress(FileNotFoundError):  # Another process clears it.
            age_s = time.time() - abandoned.stat().st_mtime
            owner = abandoned.name.partition(_BUILDING)[2]
            if age_s > _ABANDONED_AFTER_S or _owner_is_gone(owner):
                shutil.rmtree(abandoned, ignore_errors=True)


def _build_beside(final: Path, build: Callable[[Path], None]) -> None:
    clear_abandoned(final.parent, final.name)
    prefix = f".{final.name}{_BUILDING}"
    own = f"{prefix}{os.getpid()}-{platform.node()}-"
    scratch = Path(tempfile.mkdtemp(prefix=own, dir=final.parent))
    try:
        built = scratch / "built"
        built.mkdir()
        build(built)
        if final.exists():
            final.rename(scratch / "damaged")
        built.rename(final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _owner_is_gone(name: str) -> bool:
    """Whether a folder was made on this machine by a process that is no more."""
    number, _, rest = name.partition("-")
    is_ours = rest.rpartition("-")[0] == platform.node()
    return is_ours and number.isdecimal() and not psutil.pid_exists(int(number))


@contextmanager
def _clear_disk_errors(final: Path) -> Iterator[None]:
    try:
        yield
    # Not only OSErrors: safetensors tells of a full disk in its own.
    except Exception as error:
        if is_full_disk(error):
            raise full_disk_error(final.parent) from error
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            raise DataError(
                f"the cache folder {final.parent} cannot be written: {error.strerror}",
                remedy="set MOE_DIST_CACHE to a folder that you may write to",
            ) from error
        raise


def full_disk_error(folder: Path) -> DataError:
    """The error for a cache folder on a disk that is full."""
    return DataError(
        f"no space left on the disk of {folder}; nothing was kept of what did not fit",
        remedy="free some space, or set MOE_DIST_CACHE to a folder on a disk that has more",
    )
