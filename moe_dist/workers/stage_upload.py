"""Uploads what rank 0 writes in scratch space: metrics and checkpoints on the way, then results."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.distributed.checkpoint_files import list_checkpoints
from moe_dist.jobs.results import CHECKPOINT_DIR
from moe_dist.metric_log import METRIC_LOG
from moe_dist.storage import MANIFEST, Store, delete_tree, upload_tree
from moe_dist.storage.sync import Sync

SYNC_INTERVAL_S = 1.0
_HELD = ".uploading"


@contextmanager
def uploaded_stage(store: Store, stage: Path) -> Iterator[Callable[[], None]]:
    """Upload a local stage directory for as long as a job writes into it.

    When the `with` block ends well, the results go up too, or it is a StorageError; else the newest
    metrics and checkpoint, where that can be done. What it yields uploads the changes now, and
    leaves what fails to the next time. What the directory holds at first came from the store.
    """
    upload = _StageUpload(store, stage)
    sync = Sync(upload.copy_changes)
    with sync.every(SYNC_INTERVAL_S, "stage-upload", finish=upload.copy_results):
        yield sync.attempt


class _StageUpload:
    def __init__(self, store: Store, stage: Path) -> None:
        self._store = store
        self._stage = stage
        self._uploaded = {path.name for path in self._checkpoints()}
        self._log_state: tuple[int, int] | None = _state(stage / METRIC_LOG)

    def copy_results(self) -> None:
        # Checkpoints are not needed any more.
        for path in sorted(self._stage.iterdir()):
            if path.is_file():
                self._store.upload([(path, path.name)])
            elif path.name != CHECKPOINT_DIR and not path.name.startswith("."):
                upload_tree(self._store, path, path.name)

    def copy_changes(self) -> None:
        # Seen before the log is read: the log then holds every step that a checkpoint has taken.
        newest = next(iter(self._checkpoints()), None)
        self._upload_log()
        if newest is not None and newest.name not in self._uploaded:
            self._upload_checkpoint(newest)

    def _checkpoints(self) -> list[Path]:
        found = list_checkpoints(self._stage / CHECKPOINT_DIR)
        # One that is just being replaced has another name.
        return [path for path in found if not path.name.startswith(".")]

    def _upload_log(self) -> None:
        log = self._stage / METRIC_LOG
        state = _state(log)
        if state is not None and state != self._log_state:
            self._store.upload([(log, METRIC_LOG)])
            self._log_state = state

    def _upload_checkpoint(self, checkpoint: Path) -> None:
        # The loop prunes its checkpoints; what is on its way up must stay until it is there.
        held = self._stage / _HELD / checkpoint.name
        shutil.rmtree(held, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, held, copy_function=os.link)
            upload_tree(self._store, held, f"{CHECKPOINT_DIR}/{checkpoint.name}")
        finally:
            shutil.rmtree(held, ignore_errors=True)
        self._uploaded.add(checkpoint.name)
        self._prune(checkpoint.name)

    def _prune(self, uploaded: str) -> None:
        """Delete in the store what the loop has pruned here."""
        kept = {path.name for path in self._checkpoints()}
        found = {entry.name.split("/")[1] for entry in self._store.list(CHECKPOINT_DIR)}
        for name in sorted(found - kept - {uploaded}):
            delete_tree(self._store, f"{CHECKPOINT_DIR}/{name}", marker=MANIFEST)
            self._uploaded.discard(name)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns
