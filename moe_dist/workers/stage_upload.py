"""Uploads what rank 0 writes in scratch space: metrics and checkpoints on the way, then results."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from types import TracebackType

from moe_dist.distributed.checkpoint_files import list_checkpoints
from moe_dist.errors import StorageError
from moe_dist.jobs.results import CHECKPOINT_DIR, METRIC_LOG
from moe_dist.storage import MANIFEST, Store, delete_tree, upload_tree

SYNC_INTERVAL_S = 1.0
_HELD = ".uploading"

logger = logging.getLogger(__name__)


class StageUpload:
    """Follows a local stage directory from a thread, for as long as a job writes into it.

    When the `with` block ends well, the results go up too, and StorageError is raised if the store
    does not take them; else the newest metrics and checkpoint, where that can be done.

    Args:
        store: the stage's.
        stage: the local directory; what it holds now came from the store.
    """

    def __init__(self, store: Store, stage: Path) -> None:
        self._store = store
        self._stage = stage
        self._uploaded = {path.name for path in self._checkpoints()}
        self._log_state: tuple[int, int] | None = _state(stage / METRIC_LOG)
        self._is_failing = False
        # The thread's older log must not arrive after a newer one.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="stage-upload", daemon=True)

    def __enter__(self) -> StageUpload:
        """Begin to follow."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Upload what is left to upload."""
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._upload_results()
        else:
            self.try_sync()

    def _upload_results(self) -> None:
        # Checkpoints are not needed any more.
        for path in sorted(self._stage.iterdir()):
            if path.is_file():
                self._store.upload([(path, path.name)])
            elif path.name != CHECKPOINT_DIR and not path.name.startswith("."):
                upload_tree(self._store, path, path.name)

    def sync(self) -> None:
        """Upload the metric log if it has changed, then the newest checkpoint if it is new.

        Raises:
            StorageError: if the store does not take them.
        """
        with self._lock:
            # Seen before the log is read: the log then holds every step that a checkpoint has
            # taken.
            newest = next(iter(self._checkpoints()), None)
            self._upload_log()
            if newest is not None and newest.name not in self._uploaded:
                self._upload_checkpoint(newest)

    def _follow(self) -> None:
        while not self._stop.wait(SYNC_INTERVAL_S):
            self.try_sync()

    def try_sync(self) -> None:
        """Do the same; what fails is tried again the next time."""
        try:
            self.sync()
            self._is_failing = False
        except (StorageError, OSError) as error:
            if not self._is_failing:
                logger.warning("%s; trying again", str(error).splitlines()[0])
            self._is_failing = True

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
