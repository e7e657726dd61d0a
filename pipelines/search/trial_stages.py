"""The stages of a trial: its worker notes them in a file, and the driver makes runs of them.

The worker appends to `stages.jsonl` in the trial's directory, as it does to the metric log: it
talks to nobody, and a trial never waits for a tracking server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.metric_log import LineTail
from moe_dist.tracking import StageNote

from ..stages import adapt, distill, evaluate

if TYPE_CHECKING:
    from moe_dist.tracking import TrackedRun

STAGES_NAME = "stages.jsonl"
TRIAL_PREFIX = "trial/"
"""In front of what a trial measured at its rungs, among its run's metrics."""
ADAPT, EVALUATE, DISTILL = adapt.NAME, evaluate.NAME, distill.NAME


class StageLog:
    """The worker's side: says when a trial's stages begin and end.

    Args:
        directory: the trial's.
        goes_on: the stages have begun before, and the last of them was broken off.
        may_go_on: a stage that is broken off is not over.
    """

    def __init__(self, directory: Path, *, goes_on: bool = False, may_go_on: bool = False) -> None:
        self._path = directory / STAGES_NAME
        self._goes_on, self._may_go_on = goes_on, may_go_on

    @contextmanager
    def stage(self, name: str, params: Mapping[str, Any]) -> Iterator[Path]:
        """Note a stage's beginning, and its end with the block.

        Args:
            name: the stage.
            params: the settings that it reads.

        Yields:
            The stage's own directory.
        """
        directory = self._path.parent / name
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
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, default=str) + "\n")


def clear_stages(directory: Path) -> None:
    """Forget the stages of an earlier attempt, before a trial begins again.

    Args:
        directory: the trial's.
    """
    (directory / STAGES_NAME).unlink(missing_ok=True)


class TrialStages:
    """The driver's side: follows what the worker notes, and brings the runs up to it.

    Args:
        run: the trial's run.
        directory: the trial's.
        fingerprint: the trial's; an attempt of the same one continues its runs.
    """

    def __init__(self, run: TrackedRun, directory: Path, fingerprint: str) -> None:
        self._run, self._directory, self._fingerprint = run, directory, fingerprint
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
        """Give `evaluate` what the trial measured.

        Args:
            step: optimizer steps done.
            metrics: values by name.
        """
        named = {f"{evaluate.STUDENT}/{name}": value for name, value in metrics.items()}
        self._measured.append((step, named))
        self.follow()

    def end(self, status: str) -> None:
        """End what the worker has not ended, since it was stopped or died.

        Args:
            status: the trial's, in MLflow's words.
        """
        self.follow()
        for note in list(self._notes.values()):
            if note.ended_s is None:
                self._note(replace(note, status=status, ended_s=time.time()))

    def _note(self, note: StageNote) -> None:
        self._notes[note.name] = note
        self._runs[note.name] = self._run.note_stage(note)
