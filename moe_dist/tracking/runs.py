"""Trackers and the runs that they hand out; see the package's docstring for their use."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from moe_dist.metric_log import MetricLog
from moe_dist.tracking.journal import (
    JOURNAL_NAME,
    METRICS_NAME,
    RUNNING,
    Journal,
    Sent,
    Wanted,
    load_journal,
)
from moe_dist.tracking.mlflow_store import MlflowStore, describe_fault
from moe_dist.tracking.privacy import flatten, scrub

logger = logging.getLogger("moe_dist.tracking")

SEND_INTERVAL_S = 2.0
MAX_BACKOFF_S = 60.0
CLOSING_TIME_S = 30.0


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


class TrackedRun(Protocol):
    """One run, which ends with its `with` block."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None without MLflow, or as long as the server has not answered."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Add parameters, nested or flat; secrets and machine paths are taken out."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append to the run's `metrics.jsonl`; not while a job's rank 0 writes it."""

    def log_dataset(self, dataset: DatasetInput) -> None:
        """Name a data set that the run reads."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Have a file uploaded, and again if it changes; it must not hold secrets (`scrub`)."""

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
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Open the parent run of a chain; one of the same parameters is continued."""


def build_tracker(uri: str, *, experiment: str = "moe-dist", enabled: bool = True) -> Tracker:
    """Connect to MLflow.

    Args:
        uri: `sqlite:///FILE`, `http(s)://...` or another MLflow tracking URI.
        experiment: the experiment's name.
        enabled: False gives a tracker that only keeps the metric files.

    Returns:
        The tracker.

    Raises:
        TrackingError: within seconds, if the server does not answer or the store is unusable.
    """
    return MLflowTracker(uri, experiment=experiment) if enabled else NullTracker()


class NullTracker:
    """Keeps the metric files and sends nothing."""

    def chain(
        self,
        name: str,
        directory: Path,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Open a run that lives in its directory only."""
        return _LocalRun(directory)


class _LocalRun:
    """A run of which only the metric file is kept."""

    run_id: str | None = None

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def log_params(self, params: Mapping[str, object]) -> None:
        pass

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        MetricLog(self._directory / METRICS_NAME).append(step, metrics)

    def log_dataset(self, dataset: DatasetInput) -> None:
        pass

    def log_artifact(self, path: Path, folder: str = "") -> None:
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


class MLflowTracker:
    """Records chains in MLflow; the one writer to it.

    Args:
        uri: an MLflow tracking URI.
        experiment: the experiment's name.

    Raises:
        TrackingError: if the server does not answer, or the store cannot be used.
    """

    def __init__(self, uri: str, *, experiment: str = "moe-dist") -> None:
        self._store = MlflowStore(uri, experiment)

    def chain(
        self,
        name: str,
        directory: Path,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Open the parent run of a chain; one of the same parameters is continued.

        Args:
            name: the run's name.
            directory: the chain's output directory; `tracking.json` goes there.
            params: the whole configuration, nested or flat.
            tags: further tags.

        Returns:
            The run, to be used in a `with` statement.
        """
        flat = flatten(params)
        fingerprint = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()
        journal = _open_journal(name, Path(directory), fingerprint, None)
        with journal.changing() as wanted:
            wanted.params.update(flat)
            wanted.tags.update(dict(tags or {}))
        return _MlflowRun(journal, _Sender(self._store, journal))


class _MlflowRun:
    """A run whose journal a sender follows; the chain's run owns the sender."""

    def __init__(self, journal: Journal, sender: _Sender) -> None:
        self._journal = journal
        self._sender = sender

    @property
    def run_id(self) -> str | None:
        return self._journal.sent.run_id

    def log_params(self, params: Mapping[str, object]) -> None:
        with self._journal.changing() as wanted:
            wanted.params.update(flatten(params))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._journal.metric_log.append(step, metrics)

    def log_dataset(self, dataset: DatasetInput) -> None:
        entry = asdict(dataset)
        entry["name"] = str(scrub(dataset.name))
        with self._journal.changing() as wanted:
            if entry not in wanted.datasets:
                wanted.datasets.append(entry)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        path = Path(path).absolute()
        home = self._journal.directory.absolute()
        name = str(path.relative_to(home)) if path.is_relative_to(home) else str(path)
        with self._journal.changing() as wanted:
            wanted.artifacts[name] = folder

    def set_tags(self, tags: Mapping[str, str]) -> None:
        with self._journal.changing() as wanted:
            wanted.tags.update({key: str(scrub(value, key)) for key, value in tags.items()})

    def stage(
        self,
        name: str,
        directory: Path,
        *,
        params: Mapping[str, object] | None = None,
        fingerprint: str = "",
    ) -> TrackedRun:
        child = _open_journal(name, Path(directory), fingerprint, self._journal)
        with child.changing() as wanted:
            wanted.params.update(flatten(params or {}))
        return _MlflowRun(child, self._sender)

    def open_hint(self) -> str:
        return self._sender.store.run_location(self.run_id)

    def __enter__(self) -> TrackedRun:
        self._sender.follow(self._journal)
        if self._journal.parent is None:
            self._sender.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A full disk is one fault that ends a stage; closing must not hide it behind another.
        with suppress(OSError), self._journal.changing() as wanted:
            wanted.status = _status(kind)
            wanted.ended_ms = int(time.time() * 1000)
        if self._journal.parent is None:
            self._sender.finish()
        else:
            self._sender.wake()


class _Sender:
    """The thread that brings the server up to the journals.

    Args:
        store: the connection.
        chain: the chain's journal, parent of all others.
    """

    def __init__(self, store: MlflowStore, chain: Journal) -> None:
        self.store = store
        self._journals: dict[Path, Journal] = {}
        self._chain = chain
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ending = False
        self._away_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)

    def follow(self, journal: Journal) -> None:
        """Send what this journal gains from now on."""
        with self._lock:
            self._journals[journal.directory.absolute()] = journal
        self._wake.set()

    def start(self) -> None:
        """Send what earlier processes left behind, and go on in the background."""
        for path in sorted(self._chain.directory.rglob(JOURNAL_NAME)):
            left = load_journal(path.parent, self._chain)
            if path.parent != self._chain.directory and left is not None and not left.sent.complete:
                self.follow(left)
        self._pass()
        self._thread.start()

    def wake(self) -> None:
        """Send soon."""
        self._wake.set()

    def finish(self) -> None:
        """Send the rest, for a limited time, and say what could not be sent."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CLOSING_TIME_S)
        if self._thread.is_alive() or self._away_since is not None:
            with self._lock:
                journals = list(self._journals.values())
            pending = sum(self.store.count_pending(journal) for journal in journals)
            logger.warning(
                "MLflow at %s is still away: %d points wait in the output directory; "
                "the same command sends them when the server is back.",
                self.store.shown_uri,
                pending,
            )

    def _work(self) -> None:
        pause_s = SEND_INTERVAL_S
        while True:
            self._wake.wait(pause_s)
            self._wake.clear()
            ending = self._ending
            whole = self._pass()
            if ending:
                return
            pause_s = SEND_INTERVAL_S if whole else min(2 * pause_s, MAX_BACKOFF_S)

    def _pass(self) -> bool:
        """Bring every journal up to date.

        Returns:
            False if the server is away.
        """
        with self._lock:
            journals = sorted(self._journals.values(), key=lambda j: j.parent is not None)
        try:
            for journal in journals:
                if journal.sent.complete:
                    continue
                self.store.sync(journal)
        except Exception as fault:  # Whatever fails here, training goes on.
            if self._away_since is None:
                self._away_since = time.monotonic()
                logger.warning(
                    "MLflow at %s takes nothing now (%s); training goes on, and what it logs is "
                    "sent later.",
                    self.store.shown_uri,
                    describe_fault(fault),
                )
            return False
        if self._away_since is not None:
            away_s = time.monotonic() - self._away_since
            self._away_since = None
            logger.warning("MLflow answers again after %.0f s; nothing was lost.", away_s)
        return True


def _open_journal(name: str, directory: Path, fingerprint: str, parent: Journal | None) -> Journal:
    """Continue a directory's journal if it tells of the same work, else begin a new one."""
    directory = directory.absolute()
    journal = load_journal(directory, parent)
    if journal is None or journal.wanted.fingerprint != fingerprint:
        journal = Journal(directory, Wanted(name=name, fingerprint=fingerprint), Sent(), parent)
    journal.wanted.status = RUNNING
    journal.wanted.ended_ms = None
    return journal


def _status(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED"
