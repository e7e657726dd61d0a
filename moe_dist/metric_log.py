"""The metric log: what a training job measured, one JSON line for each step.

Rank 0 of a job appends here and nowhere else. The driver tails the file for its progress bar, for
MLflow and for the plots, so a killed job or a tracking server that is away loses no point, and a
resumed job doubles none.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_dist.whole_files import whole_file

METRIC_LOG = "metrics.jsonl"
"""Its name in the directory of a stage or a run."""


@dataclass(frozen=True)
class MetricRecord:
    """One line of a metric log: values by name, at an optimizer step, with the Unix time in s."""

    step: int
    time: float
    metrics: dict[str, float]


class MetricLog:
    """An append-only file of metrics by step; one process writes it, any process may read it.

    Args:
        path: the file; its directory is made on the first append.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record and hand it to the operating system at once.

        Several records may share a step (training and evaluation values, say).

        Args:
            step: the optimizer step that the values belong to.
            metrics: values by name; one that is NaN or infinite is read back as NaN.
        """
        values = {name: _finite(float(value)) for name, value in metrics.items()}
        line = json.dumps({"step": int(step), "time": time.time(), "metrics": values})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # A writer that was killed leaves half a line; a newline closes it, so that only the
            # half is lost and not this record too.
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            # Such a file may take part of a write only (a full disk): the rest follows or fails.
            pending = (("\n" if torn else "") + line + "\n").encode()
            while pending:
                pending = pending[os.write(descriptor, pending) :]
        finally:
            os.close(descriptor)

    def truncate_after(self, step: int) -> None:
        """Drop the records past a step, as a job does that resumes from that step's checkpoint.

        Args:
            step: the last step to keep.
        """
        if not self.path.exists():
            return
        kept = [record for record in self.read() if record.step <= step]
        with whole_file(self.path) as beside, beside.open("w", encoding="utf-8") as stream:
            for record in kept:
                values = {name: _finite(value) for name, value in record.metrics.items()}
                line = {"step": record.step, "time": record.time, "metrics": values}
                stream.write(json.dumps(line) + "\n")

    def read(self) -> list[MetricRecord]:
        """Read every whole record as written; torn lines of a killed writer are passed over."""
        return MetricTail(self.path).poll()


class LineTail:
    """Follows a file of lines that another process writes.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._position = 0
        self._inode: int | None = None

    def poll(self) -> list[bytes]:
        """Read what was written since the last call; a file in its place is read from its start.

        Returns:
            The new whole lines, oldest first; empty if there are none.
        """
        try:
            with self.path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if status.st_ino != self._inode or status.st_size < self._position:
                    self._inode, self._position = status.st_ino, 0
                stream.seek(self._position)
                block = stream.read()
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.splitlines()


class MetricTail:
    """Follows a metric log that another process writes.

    Args:
        path: the log's file, which need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self._lines = LineTail(path)

    def poll(self) -> list[MetricRecord]:
        """Read the whole records written since the last call, oldest first.

        After `MetricLog.truncate_after` the whole file is delivered again: who counts points must
        know which of them it has had.
        """
        parsed = (_parse(line) for line in self._lines.poll())
        return [record for record in parsed if record is not None]


def series(records: list[MetricRecord], name: str) -> tuple[list[int], list[float]]:
    """Pick one metric's steps and values out of a log; the later of two for a step counts."""
    values = {record.step: record.metrics[name] for record in records if name in record.metrics}
    return list(values), list(values.values())


def _finite(value: float) -> float | None:
    # JSON has no NaN; null keeps the file readable to every other program.
    return value if math.isfinite(value) else None


def _parse(line: bytes) -> MetricRecord | None:
    try:
        entry = json.loads(line)
        metrics = {
            str(name): math.nan if value is None else float(value)
            for name, value in entry["metrics"].items()
        }
        return MetricRecord(int(entry["step"]), float(entry["time"]), metrics)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
