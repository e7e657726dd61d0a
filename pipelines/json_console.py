"""What a program sees while a chain runs: one JSON object a line, and nothing else."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from moe_dist.errors import MoeDistError
from moe_dist.redaction import hide_secrets
from moe_dist.whole_files import finite

from .console import CONTINUES, Console

STANDARD_OUTPUT = 1
STANDARD_ERROR = 2


class JsonConsole(Console):
    """Writes events as JSON lines.

    Args:
        stream: where to.
        quiet: write warnings, results and errors only.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        super().__init__(quiet=True, live=False)
        self._stream = stream
        self._only_results = quiet

    def event(self, kind: str, **fields: object) -> None:
        """Write one event."""
        line = json.dumps(finite({"event": kind, **fields}), default=str)
        self._stream.write(hide_secrets(line) + "\n")
        self._stream.flush()

    def note(self, message: str) -> None:
        """Write a note, unless quiet."""
        self._progress_event("note", message=message)

    def warn(self, message: str) -> None:
        """Write a warning."""
        self.event("warning", message=message)

    def result(self, renderable: Any) -> None:
        """Write a result that is text; tables are for people, and a document comes at the end."""
        if isinstance(renderable, str):
            self.event("result", message=renderable)

    def output(self, text: str) -> None:
        """Pass on what a job on a cluster printed."""
        self._progress_event("output", message=text)

    def document(self, content: Mapping[str, Any], show: Callable[[], None]) -> None:
        """Write `content` as one object, with its `event`; `show` is for people and not called."""
        fields = dict(content)
        self.event(str(fields.pop("event")), **fields)

    def planned(self, stages: Sequence[str]) -> None:
        """Write which stages there are."""
        self._progress_event("planned", stages=list(stages))

    def stage_skipped(self, stage: str, seconds: float) -> None:
        """Write that a stage was already finished, and the seconds it took when it ran."""
        self._progress_event("stage_skipped", stage=stage, seconds=seconds)

    def stage_started(self, stage: str, *, resumed: bool) -> None:
        """Write that a stage begins."""
        self._stage = stage
        self._progress_event("stage_started", stage=stage, resumed=resumed)

    def progress(
        self,
        step: int,
        total: int | None,
        figures: Mapping[str, float] | None = None,
        terms: Mapping[str, float] | None = None,
    ) -> None:
        """Write how far the current stage is; see `Console.progress`."""
        self._progress_event(
            "progress",
            stage=self._stage,
            step=step,
            total=None if total is None else math.ceil(total),
            figures=dict(figures or {}),
            terms=dict(terms or {}),
        )

    def trials(
        self,
        over: int,
        total: int,
        figures: Mapping[str, float],
        running: Mapping[str, float],
    ) -> None:
        """Write how far a sweep is; see `Console.trials`."""
        self._progress_event(
            "trials", over=over, total=total, figures=dict(figures), running=dict(running)
        )

    def stage_finished(self, stage: str, seconds: float, metrics: Mapping[str, float]) -> None:
        """Write that a stage finished."""
        self._progress_event("stage_finished", stage=stage, seconds=seconds, metrics=dict(metrics))

    def _progress_event(self, kind: str, **fields: object) -> None:
        if not self._only_results:
            self.event(kind, **fields)


@contextmanager
def json_console(*, quiet: bool = False) -> Iterator[JsonConsole]:
    """Keep standard output for JSON, whatever libraries and workers print.

    When quiet, only warnings, results and errors are written.
    """
    sys.stdout.flush()
    kept = os.dup(STANDARD_OUTPUT)
    os.dup2(STANDARD_ERROR, STANDARD_OUTPUT)
    try:
        with os.fdopen(kept, "w", encoding="utf-8", closefd=False) as stream:
            console = JsonConsole(stream, quiet=quiet)
            try:
                yield console
            except MoeDistError as error:
                console.event("error", message=error.message, remedy=error.remedy)
                raise
            except KeyboardInterrupt as stop:
                console.event("stopped", message=str(stop) or CONTINUES)
                raise
    finally:
        sys.stdout.flush()
        os.dup2(kept, STANDARD_OUTPUT)
        os.close(kept)
