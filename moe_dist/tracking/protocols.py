"""What the stages see of tracking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol


@dataclass(frozen=True)
class DatasetInput:
    """A data set that a run read.

    Args:
        name: for example `glue/sst2 (train)`.
        digest: the SHA-256 of its content.
        source: where it came from: `hub`, `files`, `package`.
        context: what it was used for: `training`, `evaluation`.
        num_rows: its size.
    """

    name: str
    digest: str
    source: str
    context: str = "training"
    num_rows: int | None = None


@dataclass(frozen=True)
class TrackedModel:
    """A model that a run made, as MLflow loads and serves it.

    Args:
        name: what it is called among the models of its run: `student`.
        directory: what `moe_dist.inference.save_model` wrote.
        digest: identifies its content; a model of the same name and digest is sent once.
        num_texts: 1, or 2 where it reads pairs.
        labels: its classes; empty for regression.
        max_length: tokens after which a text is cut.
        register_as: name in the model registry; empty to leave it out of there.
        params: what people compare such models by.
        task: which of its tasks it answers; empty for a model of one task.
        answers: by name the columns that it answers with: `text`, a `number`, `numbers` or `named
            numbers`; those of a classifier or a regressor, by its labels, where there are none.
        inputs: names of the columns that it reads; none where any names will do.
        options: of the task, as the model is served with.
        calibration: what its answers are read with; None without.
    """

    name: str
    directory: Path
    digest: str
    num_texts: int
    labels: tuple[str, ...]
    max_length: int
    register_as: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    task: str = ""
    answers: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    calibration: float | None = None


@dataclass(frozen=True)
class StageNote:
    """What is known of a stage that runs elsewhere, or has run there.

    Args:
        name: what it is called below its run.
        directory: where its `metrics.jsonl` lies, which who runs it writes.
        fingerprint: the same one continues an earlier run of that directory.
        params: its settings, nested or flat.
        started_s: Unix time.
        ended_s: Unix time; None while it runs.
        status: `RUNNING`, `FINISHED`, `FAILED` or `KILLED`.
    """

    name: str
    directory: Path
    fingerprint: str
    started_s: float
    ended_s: float | None = None
    status: str = "RUNNING"
    params: Mapping[str, object] = field(default_factory=dict)


class TrackedRun(Protocol):
    """One run, which ends with its `with` block."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None without MLflow, or as long as the server has not answered."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append to the run's `metrics.jsonl`; not while a job's rank 0 writes it."""

    def log_dataset(self, dataset: DatasetInput) -> None:
        """Name a data set that the run reads."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Have a file uploaded, and again if it changes; it must not hold secrets (`scrub`)."""

    def log_model(self, model: TrackedModel) -> None:
        """Have a model directory logged as an MLflow model, and registered if it says so."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or change tags."""

    def stage(
        self,
        name: str,
        directory: Path,
        *,
        params: Mapping[str, object] | None = None,
        fingerprint: str = "",
    ) -> TrackedRun:
        """Open a child run; an unfinished one of the same fingerprint is continued."""

    def note_stage(self, note: StageNote) -> TrackedRun:
        """Bring a child run up to what is known of it; it needs no `with` block."""

    def open_hint(self) -> str:
        """A URL or a command that shows the run; empty without MLflow."""

    def __enter__(self) -> TrackedRun:
        """Open the run."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it as FINISHED, FAILED or KILLED."""


class Tracker(Protocol):
    """Where chains are recorded."""

    def chain(
        self,
        name: str,
        directory: Path,
        *,
        params: Mapping[str, object],
        identity: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Open the parent run of a chain; one of the same name and identity is continued."""
