"""Results at a URI, mirrored in scratch space for as long as a chain runs.

The store is what counts. The mirror begins with the small files that fingerprints, resuming and
the report need; models come when a stage reads them. What this process writes goes up when a stage
is finished, its `stage.json` last, and the tracking journals every few seconds, so that another
machine can go on from there.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.errors import ConfigError, StorageError
from moe_dist.metric_log import METRIC_LOG
from moe_dist.search.trials import LOG_NAME
from moe_dist.storage import (
    MANIFEST,
    Entry,
    Store,
    delete_tree,
    move_tree,
    receive_lines,
    upload_tree,
)
from moe_dist.storage.scratch import scratch_root
from moe_dist.storage.sync import Sync
from moe_dist.uris import join_uri, redact_uri
from moe_dist.whole_files import PARTIAL

from .files import ResultFiles
from .fingerprints import path_digest
from .stage_recovery import FINISHED, STARTED

SYNC_INTERVAL_S = 2.0
SMALL_BYTES = 1 << 16
INPUTS = "inputs"
_ALWAYS_SUFFIXES = frozenset({".json", ".jsonl", ".yaml", ".md", ".png"})
# What this process changes while a stage runs, and what another machine needs to go on.
_JOURNALS = frozenset({"tracking.json", METRIC_LOG, LOG_NAME, STARTED})
_LOCAL_ONLY = frozenset({".lock"})
_WORKERS_OWN = "ray"
_COMPLETE = ".complete"

logger = logging.getLogger("moe_dist.pipelines")


class MirroredFiles(ResultFiles):
    """Results at a URI.

    Args:
        uri: the run's directory.
    """

    def __init__(self, uri: str) -> None:
        name = redact_uri(uri).rpartition("/")[2]
        digest = hashlib.sha256(uri.encode()).hexdigest()[:12]
        super().__init__(scratch_root() / "runs" / f"{name}-{digest}")
        self.store = Store(uri)
        self._remote: dict[str, Entry] = {}
        self._synced: dict[str, tuple[int, int]] = {}
        self._refreshed = -SYNC_INTERVAL_S
        self._lock = threading.RLock()

    def prepare(self, source: str) -> None:
        """Check scratch space and store; raise ConfigError if either of them takes no files."""
        super().prepare(source)
        try:
            self.store.probe()
        except StorageError as error:
            self.remove_if_empty()
            fault = f"output_dir: {error.message}; {error.remedy}."
            raise ConfigError([fault], source=source) from error

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Fill the mirror, keep the journals safe meanwhile, and publish the rest at the end."""
        self._fill()
        journals = Sync(self._upload_journals)
        with journals.every(SYNC_INTERVAL_S, "mirror", finish=self._close, salvage=self._close):
            yield

    def address(self, path: Path) -> str:
        """Give the URI of a file of the run; a directory from elsewhere is uploaded first."""
        if path.is_relative_to(self.root):
            return join_uri(self.store.uri, self._name(path))
        return self._shared(path)

    def shown(self, path: Path) -> str:
        """Say where a file lies, without credentials: a URI."""
        return redact_uri(self.address(path))

    def fetch(self, path: Path) -> Path:
        """Download what is missing of a file or directory; returns the path."""
        name = self._name(path)
        with self._lock:
            wanted = [
                entry
                for key, entry in self._remote.items()
                if (key == name or key.startswith(f"{name}/")) and not (self.root / key).exists()
            ]
            self._download(wanted)
        return path

    def digest(self, path: Path) -> str:
        """Identify an output, without downloading the weights of a model; see `path_digest`."""
        if not (path / MANIFEST).is_file():
            self.fetch(path)
        return path_digest(path, self._size)

    def refresh(self, log: Path, records: Path) -> None:
        """Download what workers are writing, every few seconds at most."""
        now = time.monotonic()
        if now - self._refreshed < SYNC_INTERVAL_S:
            return
        self._refreshed = now
        try:
            self._receive_log(log)
            self._receive_records(records)
        except StorageError as error:
            logger.warning("%s; progress is shown later", error.message)

    def follow(self, path: Path) -> None:
        """Bring a file of lines up to date that a worker writes."""
        try:
            self._receive_log(path)
        except StorageError as error:
            logger.warning("%s; progress is shown later", error.message)

    def received(self, directory: Path) -> None:
        """Take note of what workers uploaded, and download the small files."""
        name = self._name(directory)
        with self._lock:
            self._remote = {
                key: entry for key, entry in self._remote.items() if not key.startswith(f"{name}/")
            }
            found = self.store.list(name)
            self._remote.update((entry.name, entry) for entry in found)
            own = _JOURNALS | {FINISHED}
            theirs = [entry for entry in found if Path(entry.name).name not in own]
            self._download([entry for entry in theirs if _is_small(entry)])
            self._receive_log(directory / METRIC_LOG)

    def publish(self, directory: Path) -> None:
        """Upload what this process wrote below a directory; manifests and results come last."""
        with self._lock:
            changed = self._changed(directory)
            ends = {MANIFEST: 1, FINISHED: 2}
            for rank in (0, 1, 2):
                group = [path for path in changed if ends.get(path.name, 0) == rank]
                self._upload(group)

    def moved(self, source: Path, target: Path) -> None:
        """Move a stage's directory in the store too."""
        old, new = self._name(source), self._name(target)
        with self._lock:
            move_tree(self.store, old, new, marker=FINISHED, last=STARTED)
            for known in (self._remote, self._synced):
                for key in [key for key in known if key.startswith(f"{new}/")]:
                    known.pop(key)
                for key in [key for key in known if key.startswith(f"{old}/")]:
                    known[new + key.removeprefix(old)] = known.pop(key)  # type: ignore[assignment]

    def removed(self, directory: Path) -> None:
        """Delete a directory, or a file, in the store too."""
        name = self._name(directory)
        with self._lock:
            if self._remote.pop(name, None) is not None:
                self.store.delete([name])
                return
            delete_tree(self.store, name, marker=FINISHED, last=STARTED)
            for known in (self._remote, self._synced):
                for key in [key for key in known if key.startswith(f"{name}/")]:
                    known.pop(key)

    def _fill(self) -> None:
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in _LOCAL_ONLY:
                path.unlink()
        self._synced.clear()
        self._remote = {entry.name: entry for entry in self.store.list()}
        self._download([entry for entry in self._remote.values() if _is_small(entry)])

    def _close(self) -> None:
        self.publish(self.root)
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def _upload_journals(self) -> None:
        with self._lock:
            self._upload([path for path in self._changed(self.root) if path.name in _JOURNALS])

    def _receive_log(self, path: Path) -> None:
        """Append what a metric log has grown by, so that readers go on where they were."""
        with self._lock:
            if receive_lines(self.store, self._name(path), path):
                self._note(path)

    def _receive_records(self, directory: Path) -> None:
        with self._lock:
            self._download(
                [
                    entry
                    for entry in self.store.list(self._name(directory))
                    if (self.root / entry.name).parent == directory
                    and Path(entry.name).suffix in (".json", ".jsonl")
                    and self._size(self.root / entry.name) != entry.size
                ]
            )

    def _shared(self, directory: Path) -> str:
        name = f"{INPUTS}/{directory.name}-{path_digest(directory)[:12]}"
        if self.store.read(f"{name}/{_COMPLETE}") is None:
            upload_tree(self.store, directory, name, marker=_COMPLETE)
            self.store.write(f"{name}/{_COMPLETE}", b"")
        return join_uri(self.store.uri, name)

    def _download(self, entries: list[Entry]) -> None:
        self.store.download([(entry.name, self.root / entry.name) for entry in entries])
        for entry in entries:
            self._note(self.root / entry.name)

    def _upload(self, paths: list[Path]) -> None:
        before = {path: _state(path) for path in paths}
        self.store.upload([(path, self._name(path)) for path in paths])
        for path, state in before.items():
            name = self._name(path)
            self._synced[name] = state
            self._remote[name] = Entry(name, state[0])

    def _changed(self, directory: Path) -> list[Path]:
        return [
            path
            for path in sorted(directory.rglob("*"))
            if path.is_file()
            and path.name not in _LOCAL_ONLY
            and path.suffix != PARTIAL
            and self._synced.get(self._name(path)) != _state(path)
        ]

    def _note(self, path: Path) -> None:
        self._synced[self._name(path)] = _state(path)

    def _size(self, path: Path) -> int | None:
        if path.is_file():
            return path.stat().st_size
        entry = self._remote.get(self._name(path))
        return None if entry is None else entry.size

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name


def _is_small(entry: Entry) -> bool:
    parts = Path(entry.name).parts
    if _WORKERS_OWN in parts or INPUTS in parts:
        return False
    if "checkpoints" in parts:
        # That a checkpoint is there is enough to know.
        return parts[-1] == MANIFEST
    return entry.size <= SMALL_BYTES or Path(entry.name).suffix in _ALWAYS_SUFFIXES


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
