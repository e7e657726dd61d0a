"""Whole directories in a store, which appear and disappear with one file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.errors import StorageError
from moe_dist.storage.store import Store
from moe_dist.uris import is_uri, redact_uri
from moe_dist.whole_files import whole_file

MANIFEST = "manifest.json"


def upload_tree(store: Store, local: Path, name: str, *, marker: str = MANIFEST) -> None:
    """Upload a directory; readers see it when `marker`, the last file, is there.

    What lay there before is taken away first, so that a reader finds the old directory, none, or
    the new one.
    """
    delete_tree(store, name, marker=marker)
    files = [path for path in sorted(local.rglob("*")) if path.is_file()]
    last = [path for path in files if path == local / marker]
    rest = [path for path in files if path not in last]
    for group in (rest, last):
        store.upload([(path, f"{name}/{path.relative_to(local).as_posix()}") for path in group])


def download_tree(store: Store, name: str, local: Path, *, marker: str | None = MANIFEST) -> None:
    """Download a directory; it appears whole or not at all.

    Args:
        store: where from.
        name: its name in the store.
        local: where to; what is there is replaced.
        marker: the file without which the directory does not count; None takes any files.

    Raises:
        StorageError: if there is no such directory, or it was not uploaded to its end.
    """
    names = [entry.name for entry in store.list(name)]
    prefix = f"{name}/" if name else ""
    if not names or (marker is not None and prefix + marker not in names):
        raise StorageError(
            f"{redact_uri(store.at(name).uri)} is not there, or was not uploaded to its end",
            remedy="check the URI; the same command as before uploads it again",
        )
    local.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{local.name}.", dir=local.parent))
    try:
        store.download([(entry, beside / entry.removeprefix(prefix)) for entry in names])
        shutil.rmtree(local, ignore_errors=True)
        beside.chmod(0o755)
        beside.rename(local)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def delete_tree(store: Store, name: str, *, marker: str = MANIFEST, last: str = "") -> None:
    """Delete a directory, `marker` first, so that it is not seen any more, and `last` last.

    `last` is a file that tells whose the directory is.
    """
    names = [entry.name for entry in store.list(name)]
    ends = (f"{name}/{marker}", f"{name}/{last}")
    store.delete([found for found in names if found == ends[0]])
    store.delete([found for found in names if found not in ends])
    store.delete([found for found in names if found == ends[1]])


def move_tree(
    store: Store, source: str, target: str, *, marker: str = MANIFEST, last: str = ""
) -> None:
    """Give a directory another name: copied inside the store, then deleted as `delete_tree` does.

    What is at the target is replaced.
    """
    delete_tree(store, target, marker=marker, last=last)
    names = [entry.name.removeprefix(f"{source}/") for entry in store.list(source)]
    for group in ([name for name in names if name != marker], [marker] * (marker in names)):
        store.copy([(f"{source}/{name}", f"{target}/{name}") for name in group])
    delete_tree(store, source, marker=marker, last=last)


def receive_lines(store: Store, name: str, local: Path) -> bool:
    """Append what a file of lines has grown by, so that readers go on where they were.

    Args:
        store: where the file is written.
        name: its name there.
        local: its copy; replaced where the file does not continue it.

    Returns:
        Whether there is such a file.
    """
    content = store.read(name)
    if content is None:
        return False
    known = local.read_bytes() if local.exists() else b""
    if content != known or not local.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith(known):
            with local.open("ab") as stream:
                stream.write(content[len(known) :])
        else:
            with whole_file(local) as beside:
                beside.write_bytes(content)
    return True


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Download a directory for as long as it is needed.

    Args:
        uri: a directory with a manifest, such as a model; a path is left where it is.

    Yields:
        Where it lies on this machine; a download is gone afterwards.
    """
    if not is_uri(uri):
        yield Path(uri)
        return
    store = Store(uri)
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as scratch:
        local = Path(scratch) / (redact_uri(uri).rstrip("/").rpartition("/")[2] or "copy")
        download_tree(store, "", local)
        yield local


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """Download one file while it is needed, under its own name; a path stays in place."""
    if not is_uri(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as scratch:
        local = Path(scratch) / redact_uri(uri).rpartition("/")[2]
        Store(uri).download([("", local)])
        yield local
