"""The stages of a trial: its worker notes them in a file, and the driver makes runs of them.

The worker appends to `stages.jsonl` in the trial's directory, as it does to the metric log: it
talks to nobody, and a trial never waits for a tracking server. In a store, which knows no
appending, it writes the file anew; the driver looks there when a trial has measured something.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import StorageError
from moe_dist.metric_log import METRIC_LOG, LineTail
from moe_dist.storage import Store
from moe_dist.tracking import StageNote
from moe_dist.uris import below

from ..stages import adapt, distill, evaluate

if TYPE_CHECKING:
    from moe_dist.tracking import TrackedRun

    from ..chain.files import ResultFiles

STAGES_NAME = "stages.jsonl"
TRIAL_PREFIX = "trial/"
"""In front of what a trial measured at its rungs, among its run's metrics."""
CONFIRMS_TAG = "confirms"
"""The tag of a run with another seed; its value is the trial that the seeds judge."""
ADAPT, EVALUATE, DISTILL = adapt.NAME, evaluate.NAME, distill.NAME

logger = logging.getLogger("moe_dist.pipelines")


class StageLog:
    """The worker's side: says when a trial's stages begin and end.

    Args:
        directory: the trial's; a URI as text.
        goes_on: the stages have begun before, and the last of them was broken off.
        may_go_on: a stage that is broken off is not over.
    """

    def __init__(
        self, directory: Path | str, *, goes_on: bool = False, may_go_on: bool = False
    ) -> None:
        self._directory = directory
        self._store = Store(directory) if isinstance(directory, str) else None
        self._lines: list[str] = []
        self._goes_on, self._may_go_on = goes_on, may_go_on

    @contextmanager
    def stage(self, name: str, params: Mapping[str, Any]) -> Iterator[Path | str]:
        """Note a stage's beginning, and its end with the block; yields its directory."""
        directory = below(self._directory, name)
        if isinstance(directory, Path):
            directory.mkdir(parents=True, exist_ok=True)
        if not self._goes_on:
            self._append({"stage": name, "started_s": time.time(), "params": dict(params)})
        ended: dict[str, Any] = {"stage": name, "status": "FINISHED"}
        is_over = not self._goes_on or name == DISTILL
        try:
            yield directory
        except Exception:
            ended["status"] = "FAILED"
            raise
        except BaseException:
            is_over = is_over and not self._may_go_on
            raise
        finally:
            # A trial that is ended early leaves by another way, and did nothing wrong.
            if is_over:
                self._append({**ended, "ended_s": time.time()})

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, default=str) + "\n"
        if self._store is None:
            with (Path(self._directory) / STAGES_NAME).open("a", encoding="utf-8") as stream:
                stream.write(line)
            return
        self._lines.append(line)
        try:
            self._store.write(STAGES_NAME, "".join(self._lines).encode())
        except StorageError as error:
            # What a trial finds is worth more than when its stages ran; the next note has all.
            logger.warning("%s", error.message)


def clear_stages(directory: Path, files: ResultFiles) -> None:
    """Forget the stages of an earlier attempt, before a trial begins again."""
    path = directory / STAGES_NAME
    if path.exists():
        files.removed(path)
        path.unlink()


class TrialStages:
    """The driver's side: follows what the worker notes, and brings the runs up to it.

    Args:
        run: the trial's run.
        directory: the trial's.
        fingerprint: the trial's; an attempt of the same one continues its runs.
        files: the sweep's.
    """

    def __init__(
        self, run: TrackedRun, directory: Path, fingerprint: str, files: ResultFiles
    ) -> None:
        self._run, self._directory, self._fingerprint = run, directory, fingerprint
        self._files = files
        self._lines = LineTail(directory / STAGES_NAME)
        self._notes: dict[str, StageNote] = {}
        self._runs: dict[str, TrackedRun] = {}
        self._measured: list[tuple[int, Mapping[str, float]]] = []

    def follow(self) -> None:
        """Take note of what the worker has noted since the last call."""
        for entry in map(json.loads, self._lines.poll()):
            name = entry["stage"]
            if "started_s" in entry:
                note = StageNote(
                    name,
                    self._directory / name,
                    self._fingerprint,
                    started_s=entry["started_s"],
                    params=entry["params"],
                )
            elif name in self._notes:
                ends = {"ended_s": entry["ended_s"], "status": entry["status"]}
                note = replace(self._notes[name], **ends)
            else:
                continue
            self._note(note)
        # What a worker on another node writes may be seen later than what it says.
        if EVALUATE in self._runs:
            for step, metrics in self._measured:
                self._runs[EVALUATE].log_metrics(step, metrics)
            self._measured.clear()

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note what the trial measured: in its own run, and as a result of `evaluate`."""
        own, named = (
            {f"{prefix}{name}": value for name, value in metrics.items()}
            for prefix in (TRIAL_PREFIX, f"{evaluate.STUDENT}/")
        )
        self._run.log_metrics(step, own)
        self._measured.append((step, named))
        self._receive()
        self.follow()

    def end(self, status: str) -> None:
        """End, with a status in MLflow's words, what the worker has not: it was stopped or died."""
        self._receive()
        try:
            self._files.received(self._directory / DISTILL)
        except StorageError as error:
            logger.warning("%s; its answers are missing in the report", error.message)
        self.follow()
        for note in list(self._notes.values()):
            if note.ended_s is None:
                self._note(replace(note, status=status, ended_s=time.time()))

    def _receive(self) -> None:
        for path in (self._directory / STAGES_NAME, self._directory / DISTILL / METRIC_LOG):
            self._files.follow(path)

    def _note(self, note: StageNote) -> None:
        self._notes[note.name] = note
        self._runs[note.name] = self._run.note_stage(note)
