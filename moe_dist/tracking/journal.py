"""The journal of one tracked run: what the server should show, and what it has had.

It lies as `tracking.json` in the run's directory, so that a process that starts again, today or
after an outage, knows what is still to be sent.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.metric_log import METRIC_LOG, MetricLog
from moe_dist.whole_files import whole_file

JOURNAL_NAME = "tracking.json"
RUNNING = "RUNNING"
NO_PARENT = "."


@dataclass
class Wanted:
    """What the run should look like on the server."""

    name: str
    fingerprint: str
    parent: str = ""
    """The parent's directory as seen from this one; `NO_PARENT` for a chain, and empty in journals
    of earlier versions, which do not say."""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    ended_ms: int | None = None
    status: str = RUNNING
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    """Folder on the server by file path, relative to the run's directory where it lies in it."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The fields of a `TrackedModel` by its name, its directory as those of artifacts."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Store by id, of runs that this directory held before and that may be left as running."""


@dataclass
class Sent:
    """What the server has confirmed."""

    uri: str = ""
    run_id: str | None = None
    creating: bool = False
    complete: bool = False
    status: str = RUNNING
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    """Size and time of change by file path, so that a file that changed is sent again."""
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    """By name, the `digest` and `model_id` of a model, whether it is `ready`, and the name that it
    is `registered` as."""
    last_steps: dict[str, int] = field(default_factory=dict)
    last_values: dict[str, tuple[int, float]] = field(default_factory=dict)
    """A chain's newest values, each with the step that the metric log has it at."""


class Journal:
    """Wanted and sent state of one run; safe for the caller's thread and the sending one.

    Args:
        directory: the run's directory, which holds its metric log too.
        wanted: the wanted state.
        sent: the sent state.
        parent: the journal of the run that this one is a child of.
    """

    def __init__(
        self, directory: Path, wanted: Wanted, sent: Sent, parent: Journal | None = None
    ) -> None:
        self.directory = directory
        self.wanted = wanted
        self.sent = sent
        self.parent = parent
        self.lock = threading.RLock()
        self.revision = 0
        """Counts the changes of what is wanted, those of this process only."""
        self.attached = False
        """Whether this process has looked at what the server has of the run."""
        self.is_new = False
        """Whether this process made the run, so that no earlier one left children open below it."""
        self._retired = False

    @property
    def depth(self) -> int:
        """0 for a chain, 1 for its stages and trials, 2 for the stages of a trial."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def metric_log(self) -> MetricLog:
        """The log whose records belong to this run."""
        return MetricLog(self.directory / METRIC_LOG)

    @contextmanager
    def changing(self) -> Iterator[Wanted]:
        """Change the wanted state and write it down."""
        with self.lock:
            yield self.wanted
            self.revision += 1
            self.sent.complete = False
            self.save()

    @contextmanager
    def confirming(self) -> Iterator[Sent]:
        """Change the sent state and write it down."""
        with self.lock:
            yield self.sent
            self.save()

    def nest_below(self, parent: Journal | None) -> None:
        """Make this the journal of a parent's child, or of a chain.

        Args:
            parent: the parent's journal; None for a chain.
        """
        above = self.directory if parent is None else parent.directory
        with self.lock:
            self.parent = parent
            # In this form the output directory may be moved.
            self.wanted.parent = os.path.relpath(above, self.directory)

    def retire(self) -> None:
        """Leave the directory to another journal; what still happens to this one is not kept."""
        with self.lock:
            self._retired = True

    def save(self) -> None:
        """Write the journal beside its file, then move it into place."""
        with self.lock:
            if self._retired:
                return
            text = json.dumps({"wanted": asdict(self.wanted), "sent": asdict(self.sent)}, indent=1)
            with whole_file(self.directory / JOURNAL_NAME) as beside:
                beside.write_text(text, encoding="utf-8")


def load_journal(directory: Path, parent: Journal | None = None) -> Journal | None:
    """Read a directory's journal; None if there is none or it cannot be read.

    Without it, the run is begun anew. `parent` is the journal of the parent run.
    """
    try:
        entry = json.loads((directory / JOURNAL_NAME).read_text(encoding="utf-8"))
        return Journal(directory, Wanted(**entry["wanted"]), Sent(**entry["sent"]), parent)
    except (OSError, ValueError, TypeError, KeyError):
        return None
