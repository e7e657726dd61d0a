"""A job's records (attempts, the reason of a stop): a directory that driver and workers share.

Where they share none, the records lie at a URI, and each process has copies in scratch space.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_dist.storage import Store
from moe_dist.storage.sync import Sync
from moe_dist.uris import is_uri, join_uri
from moe_dist.whole_files import whole_file

SYNC_INTERVAL_S = 1.0
_GROWING = ".jsonl"
_RECORDS = (f"[!.]*{_GROWING}", "[!.]*.json")


class Records:
    """Records in a directory of this machine, or one that is mounted on all.

    Args:
        directory: where they lie.
    """

    look_every_s = 0.5
    """How often it is worth while to look for what others wrote, in seconds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.location = str(directory)

    @property
    def ray_storage(self) -> dict[str, Any]:
        """Name and storage of a run, as Ray Train's `RunConfig` wants them."""
        return {"name": self.directory.name, "storage_path": str(self.directory.parent)}

    def clear(self, patterns: Sequence[str]) -> None:
        """Forget what an earlier job left, by `fnmatch` patterns."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in list(self.directory.iterdir()):
            if _matches(path.name, patterns):
                path.unlink(missing_ok=True)

    def pull(self) -> None:
        """Bring the directory up to date with what other processes wrote."""

    def push(self) -> None:
        """Let other processes see what this one wrote; what fails is tried again the next time."""


class RemoteRecords(Records):
    """Records at a URI; `clear` and `pull` raise StorageError where the store fails.

    A file that grows has one writer. Of any other, the first to reach the store stays, since the
    first rank to fail tells the reason.

    Args:
        uri: where they lie.
    """

    look_every_s = 2.0

    def __init__(self, uri: str) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="moe-dist-records-")
        super().__init__(Path(self._temporary.name))
        self.location = uri
        self._store = Store(uri)
        self._known: dict[str, bytes] = {}
        self._sync = Sync(self._upload)
        self._lock = threading.Lock()

    @property
    def ray_storage(self) -> dict[str, Any]:
        """Name and storage of a run; the URI itself may hold credentials and stays here."""
        parent, _, name = self._store.root.rpartition("/")
        return {
            "name": name,
            "storage_path": parent,
            "storage_filesystem": self._store.filesystem,
        }

    def clear(self, patterns: Sequence[str]) -> None:
        """Forget what an earlier job left, here and at the URI."""
        super().clear(patterns)
        names = [entry.name for entry in self._store.list()]
        self._store.delete([name for name in names if _matches(name, patterns)])

    def pull(self) -> None:
        """Download the records that are new; Ray's own files are left out."""
        with self._lock:
            self._download()

    def _download(self) -> None:
        for entry in self._store.list():
            known = self._known.get(entry.name)
            if not _matches(entry.name, _RECORDS) or (known and len(known) == entry.size):
                continue
            content = self._store.read(entry.name)
            if content is not None:
                with whole_file(self.directory / entry.name) as beside:
                    beside.write_bytes(content)
                self._known[entry.name] = content

    def push(self) -> None:
        """Upload the records that this process changed; what fails is tried again the next time."""
        self._sync.attempt()

    @contextmanager
    def pushed(self) -> Iterator[None]:
        """Upload changes every second while a `with` block lasts, and when it is over."""
        with self._sync.every(SYNC_INTERVAL_S, "records"):
            yield

    def _upload(self) -> None:
        with self._lock:
            for path in sorted(self.directory.iterdir()):
                if not _matches(path.name, _RECORDS):
                    continue
                content = path.read_bytes()
                if content == self._known.get(path.name):
                    continue
                if path.suffix == _GROWING or self._store.read(path.name) is None:
                    self._store.write(path.name, content)
                self._known[path.name] = content


def open_records(storage_path: Path | str, name: str) -> Records:
    """Find the records in `storage_path / name`; nothing is read or written yet."""
    if is_uri(storage_path):
        return RemoteRecords(join_uri(str(storage_path), name))
    return Records(Path(storage_path).absolute() / name)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def local_records(location: str) -> Iterator[Records]:
    """Give a worker a directory of records that all processes of its job know.

    Records at a URI are uploaded every second; StorageError if they cannot be read.
    """
    if not is_uri(location):
        yield Records(Path(location))
        return
    records = RemoteRecords(location)
    records.pull()
    with records.pushed():
        yield records
