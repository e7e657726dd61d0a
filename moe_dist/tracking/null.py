"""Tracking switched off: the metric files are kept, and nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from moe_dist.metric_log import METRIC_LOG, MetricLog
from moe_dist.tracking.protocols import DatasetInput, StageNote, TrackedModel, TrackedRun


class NullTracker:
    """Keeps the metric files and sends nothing."""

    def chain(
        self,
        name: str,
        directory: Path,
        *,
        params: Mapping[str, object],
        identity: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Open a run that lives in its directory only."""
        return _LocalRun(directory)


class _LocalRun:
    """A run of which only the metric file is kept."""

    run_id: str | None = None

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        MetricLog(self._directory / METRIC_LOG).append(step, metrics)

    def log_dataset(self, dataset: DatasetInput) -> None:
        pass

    def log_artifact(self, path: Path, folder: str = "") -> None:
        pass

    def log_model(self, model: TrackedModel) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def stage(
        self,
        name: str,
        directory: Path,
        *,
        params: Mapping[str, object] | None = None,
        fingerprint: str = "",
    ) -> TrackedRun:
        return _LocalRun(directory)

    def note_stage(self, note: StageNote) -> TrackedRun:
        return _LocalRun(note.directory)

    def open_hint(self) -> str:
        return ""

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass
