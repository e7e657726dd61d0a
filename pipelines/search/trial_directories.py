"""Where the training of a trial writes: into its directory, or into scratch space for a URI.

The worker that runs a trial may lie on another node than the driver. Where they share nothing but a
store, the worker uploads what it wrote before it says what it measured.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_dist.errors import StorageError
from moe_dist.jobs.results import CHECKPOINT_DIR, MODEL_DIR
from moe_dist.metric_log import METRIC_LOG, MetricRecord, MetricTail
from moe_dist.storage import Store, delete_tree, receive_lines, upload_tree
from moe_dist.storage.scratch import scratch_root
from moe_dist.workers.stage_upload import uploaded_stage

STUDENT = "student"
_OF_NO_USE = (STUDENT, MODEL_DIR, CHECKPOINT_DIR)
"""What a trial of several workers leaves, and nobody reads."""


@contextmanager
def written_here(directory: Path | str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Give a training here a directory, and what uploads its log; all files go up at a good end."""
    if isinstance(directory, Path):
        yield directory, lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="trial-", dir=scratch_root()) as scratch:
        local = Path(scratch)
        with uploaded_stage(Store(directory), local) as upload:
            yield local, upload


@contextmanager
def student_for_workers(
    student: Any, tokenizer: Any, directory: Path | str
) -> Iterator[Callable[[], list[MetricRecord]]]:
    """Put a student where the trial's workers find it, and follow what they log.

    Yields what reads the lines that the metric log has gained. The student is `STUDENT` below
    the directory, a path or a URI as text; models and checkpoints are removed with the block.
    """
    from moe_dist.inference.saving import save_model

    if isinstance(directory, Path):
        save_model(student, directory / STUDENT, tokenizer=tokenizer)
        try:
            yield MetricTail(directory / METRIC_LOG).poll
        finally:
            for name in _OF_NO_USE:
                shutil.rmtree(directory / name, ignore_errors=True)
        return
    store = Store(directory)
    with tempfile.TemporaryDirectory(prefix="trial-", dir=scratch_root()) as scratch:
        local = Path(scratch)
        save_model(student, local / STUDENT, tokenizer=tokenizer)
        upload_tree(store, local / STUDENT, STUDENT)
        log = local / METRIC_LOG
        tail = MetricTail(log)

        def poll() -> list[MetricRecord]:
            receive_lines(store, METRIC_LOG, log)
            return tail.poll()

        try:
            yield poll
        finally:
            # What stays is written over by the next attempt.
            with suppress(StorageError):
                for name in _OF_NO_USE:
                    delete_tree(store, name)
