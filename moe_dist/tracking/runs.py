"""MLflow's tracker and the runs that it hands out; see the package's docstring for their use."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from moe_dist.tracking.journal import RUNNING, Journal, Sent, Wanted, load_journal
from moe_dist.tracking.mlflow_store import MlflowStore
from moe_dist.tracking.null import NullTracker
from moe_dist.tracking.privacy import flatten, scrub
from moe_dist.tracking.protocols import (
    DatasetInput,
    StageNote,
    TrackedModel,
    TrackedRun,
    Tracker,
)
from moe_dist.tracking.sender import Sender

RECIPE_TAG = "recipe_hash"
"""The same for runs of one recipe, wherever and on however many workers they run."""


def build_tracker(uri: str, *, experiment: str = "moe-dist", enabled: bool = True) -> Tracker:
    """Connect to MLflow; TrackingError, within seconds, if it cannot be used.

    `uri` is `sqlite:///FILE`, `http(s)://...` or another MLflow tracking URI. Not `enabled`, the
    tracker only keeps the metric files.
    """
    return MLflowTracker(uri, experiment=experiment) if enabled else NullTracker()


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
        identity: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Open the parent run of a chain; one of the same name and identity goes on.

        Other parameters may differ. Those that the run has already keep their values, since MLflow
        cannot change them; a tag `changed.KEY` gives the new one. `identity` is the part of
        `params` that makes the chain the one it is; None is all of it.
        """
        own = params if identity is None else identity
        journal = _open_journal(name, Path(directory), _identity_digest(own), None)
        with journal.changing() as wanted:
            wanted.params.update(flatten(params))
            wanted.tags.update({RECIPE_TAG: recipe_hash(own), **(tags or {})})
        return _MlflowRun(journal, Sender(self._store, journal))


class _MlflowRun:
    """A run whose journal a sender follows; the chain's run owns the sender."""

    def __init__(self, journal: Journal, sender: Sender) -> None:
        self._journal = journal
        self._sender = sender

    @property
    def run_id(self) -> str | None:
        return self._journal.sent.run_id

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._journal.metric_log.append(step, metrics)
        if self._journal.wanted.status != RUNNING:
            # Its end has been sent perhaps, and nobody looks at its log any more.
            with self._journal.changing():
                pass

    def log_dataset(self, dataset: DatasetInput) -> None:
        entry = asdict(dataset)
        entry["name"] = str(scrub(dataset.name))
        with self._journal.changing() as wanted:
            if entry not in wanted.datasets:
                wanted.datasets.append(entry)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        with self._journal.changing() as wanted:
            wanted.artifacts[self._relative(path)] = folder

    def log_model(self, model: TrackedModel) -> None:
        entry = asdict(model) | {"directory": self._relative(model.directory)}
        entry["params"] = flatten(model.params)
        with self._journal.changing() as wanted:
            wanted.models[model.name] = entry

    def _relative(self, path: Path) -> str:
        """Name a file as the journal does, so that the output directory may be moved."""
        path = Path(path).absolute()
        home = self._journal.directory.absolute()
        return str(path.relative_to(home)) if path.is_relative_to(home) else str(path)

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
        child = self._open_child(name, Path(directory), fingerprint)
        with child.changing() as wanted:
            wanted.params.update(flatten(params or {}))
            wanted.status, wanted.ended_ms = RUNNING, None
        return _MlflowRun(child, self._sender)

    def note_stage(self, note: StageNote) -> TrackedRun:
        child = self._open_child(note.name, note.directory, note.fingerprint)
        with child.changing() as wanted:
            wanted.params.update(flatten(note.params))
            wanted.started_ms = int(note.started_s * 1000)
            wanted.ended_ms = None if note.ended_s is None else int(note.ended_s * 1000)
            wanted.status = note.status
        self._sender.follow(child)
        return _MlflowRun(child, self._sender)

    def _open_child(self, name: str, directory: Path, fingerprint: str) -> Journal:
        """Continue or begin a child's journal; only one writes to a directory at any time."""
        followed = self._sender.followed(directory)
        if followed is not None and followed.wanted.fingerprint == fingerprint:
            followed.nest_below(self._journal)
            return followed
        if followed is not None:
            followed.retire()
        return _open_journal(name, directory, fingerprint, self._journal)

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


def recipe_hash(identity: Mapping[str, object]) -> str:
    """Name a recipe, whatever the workers, directories and comparisons that it runs with."""
    return _identity_digest(identity)[:12]


def _identity_digest(identity: Mapping[str, object]) -> str:
    flat = flatten(identity)
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def _open_journal(name: str, directory: Path, fingerprint: str, parent: Journal | None) -> Journal:
    """Continue a directory's journal if it tells of the same work, else begin a new one."""
    directory = directory.absolute()
    journal = load_journal(directory, parent)
    known = None if journal is None else (journal.wanted.name, journal.wanted.fingerprint)
    if journal is None or known != (name, fingerprint):
        wanted = Wanted(name=name, fingerprint=fingerprint)
        if journal is not None and parent is None:
            wanted.replaced.update(journal.wanted.replaced)
            if journal.sent.run_id is not None:
                wanted.replaced[journal.sent.run_id] = journal.sent.uri
        journal = Journal(directory, wanted, Sent(), parent)
    journal.nest_below(parent)
    journal.wanted.status = RUNNING
    journal.wanted.ended_ms = None
    return journal


def _status(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED"
