"""The MLflow side of tracking: brings a server's run up to what a journal wants.

mlflow is imported when a connection is made, and not before.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.digests import file_digest
from moe_dist.metric_log import MetricTail
from moe_dist.redaction import hide_secrets
from moe_dist.tracking.connection import (
    REJECTED,
    connect,
    database_path,
    describe_fault,
    is_databricks,
    usable,
)
from moe_dist.tracking.database_lock import DatabaseLock
from moe_dist.tracking.journal import RUNNING, Journal, Sent
from moe_dist.tracking.metric_summary import experiment_tags, summarise_metrics
from moe_dist.tracking.models import ModelSender
from moe_dist.tracking.privacy import redact_uri

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric, Run

logger = logging.getLogger("moe_dist.tracking")

# MLflow's own limits.
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
MAX_VALUE_LENGTH = 6000
MAX_DIGEST_LENGTH = 36
SOURCE_TAGS = ("mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit")
IDENTITY_TAG = "moe_dist.identity"
_NAME_FAULTS = re.compile(r"[^\w.\- /:]")


class MlflowStore:
    """A connection to one experiment of an MLflow server or database.

    Args:
        uri: `http(s)://...`, `sqlite:///FILE` or another database URI.
        experiment: the experiment's name; it is made if it is not there.

    Raises:
        TrackingError: if the server does not answer, or the store cannot be used.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.shown_uri = redact_uri(uri)
        self._uri = uri
        database = database_path(uri)
        self._lock = DatabaseLock(database)
        self._client = connect(uri, self._lock)
        with usable(uri), self._lock.held():
            self.experiment_id = self._find_or_create(experiment, database)
        is_served = uri.startswith("http") or is_databricks(uri)
        self._models = ModelSender(
            self._client, self.experiment_id, self._lock, is_served=is_served
        )
        self._tails: dict[Path, _MetricFeed] = {}

    def _find_or_create(self, name: str, database: Path | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            # A database alone would put artifacts under the working directory, which on a cluster
            # is a temporary copy; beside the database they stay.
            root = None if database is None else database.parent.resolve() / "mlartifacts"
            try:
                return str(
                    self._client.create_experiment(
                        name, artifact_location=root and root.as_uri(), tags=experiment_tags()
                    )
                )
            except MlflowException as fault:
                if fault.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # Another process of a server's has just made it.
            found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        self._tag(found)
        return str(found.experiment_id)

    def _tag(self, experiment: Experiment) -> None:
        """Say how an experiment is shown, where nobody has said it."""
        from mlflow.exceptions import MlflowException

        try:
            for key, value in experiment_tags().items():
                if key not in experiment.tags:
                    self._client.set_experiment_tag(experiment.experiment_id, key, value)
        except MlflowException as fault:
            # Who may log runs into an experiment need not own it.
            logger.warning("MLflow shows the experiment as it is: %s", describe_fault(fault))

    def sync(self, journal: Journal) -> None:
        """Send what the server lacks of a run; does nothing if it lacks nothing.

        Args:
            journal: the run; its parent must have been synchronised before it.
        """
        sent = journal.sent
        if sent.uri != self.shown_uri:
            journal.sent = sent = Sent(uri=self.shown_uri)
        revision = journal.revision
        with self._lock.held():
            if sent.run_id is None:
                self._create(journal)
            elif not journal.attached:
                self._reattach(journal)
            journal.attached = True
            run_id = journal.sent.run_id
            assert run_id is not None
            self._send_params_and_tags(journal, run_id)
            self._send_datasets(journal, run_id)
        self._send_metrics(journal, run_id)
        self._send_artifacts(journal, run_id)
        self._models.send(journal, run_id)
        with self._lock.held():
            self._send_status(journal, run_id, revision)

    @property
    def uploading(self) -> str:
        """The model that is on its way to the server; empty if none is."""
        return self._models.uploading

    def run_location(self, run_id: str | None) -> str:
        """Give a run's URL, or the command that serves the database."""
        if self.shown_uri.startswith("http"):
            base = self.shown_uri.rstrip("/")
            return f"{base}/#/experiments/{self.experiment_id}/runs/{run_id}"
        if is_databricks(self._uri):
            host = os.environ.get("DATABRICKS_HOST", "").rstrip("/")
            return f"{host}/ml/experiments/{self.experiment_id}/runs/{run_id}"
        return f"mlflow ui --backend-store-uri {shlex.quote(hide_secrets(self._uri))}"

    def count_pending(self, journal: Journal) -> int:
        """Count the metric points that the server has not had."""
        return self._feed(journal).count_pending()

    def _create(self, journal: Journal) -> None:
        wanted, sent = journal.wanted, journal.sent
        run = self._find(wanted.identity) if sent.creating else None
        self._close_replaced(journal)
        if run is None:
            sent.creating = True
            journal.save()
            tags = {IDENTITY_TAG: wanted.identity}
            if journal.parent is not None:
                # Children have the same source as the run that they belong to.
                tags |= {k: v for k, v in journal.parent.wanted.tags.items() if k in SOURCE_TAGS}
                tags["mlflow.parentRunId"] = str(journal.parent.sent.run_id)
                if not journal.parent.is_new:
                    self._close_abandoned(wanted.name, tags["mlflow.parentRunId"])
            run = self._client.create_run(
                self.experiment_id, wanted.started_ms, tags=tags, run_name=wanted.name
            )
            journal.is_new = True
        self._tails.pop(journal.directory, None)
        journal.sent = Sent(uri=self.shown_uri, run_id=run.info.run_id)
        journal.save()

    def _find(self, identity: str) -> Run | None:
        # An answer that was lost on its way leaves a run that nobody knows of.
        found = self._client.search_runs(
            [self.experiment_id], filter_string=f"tags.`{IDENTITY_TAG}` = '{identity}'"
        )
        return found[0] if found else None

    def _close_abandoned(self, name: str, parent_run_id: str) -> None:
        quoted = name.replace("'", "")
        condition = (
            f"tags.`mlflow.parentRunId` = '{parent_run_id}' and attributes.status = 'RUNNING' "
            f"and attributes.run_name = '{quoted}'"
        )
        for run in self._client.search_runs([self.experiment_id], filter_string=condition):
            self._client.set_terminated(run.info.run_id, "KILLED")

    def _close_replaced(self, journal: Journal) -> None:
        from mlflow.exceptions import MlflowException

        # Only one process works in a directory: what it held before is no longer running.
        for run_id, uri in list(journal.wanted.replaced.items()):
            if uri != self.shown_uri:
                continue
            try:
                if self._client.get_run(run_id).info.status == RUNNING:
                    self._client.set_terminated(run_id, "KILLED")
            except MlflowException as fault:
                if fault.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            with journal.lock:
                del journal.wanted.replaced[run_id]
                journal.save()

    def _reattach(self, journal: Journal) -> None:
        from mlflow.exceptions import MlflowException

        sent = journal.sent
        try:
            run = self._client.get_run(str(sent.run_id))
        except MlflowException as fault:
            if fault.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            journal.sent = Sent(uri=self.shown_uri)
            self._create(journal)
            return
        sent.status = run.info.status
        sent.params = dict(run.data.params)
        last_steps, last_values = dict(sent.last_steps), dict(sent.last_values)
        for name in {*run.data.metrics, *sent.last_steps}:
            history = self._client.get_metric_history(run.info.run_id, name)
            last_steps[name] = max((point.step for point in history), default=-1)
            if journal.parent is None and history:
                newest = max(history, key=lambda point: point.step)
                logged_step, _ = last_values.get(name, (newest.step, 0.0))
                last_values[name] = (logged_step, newest.value)
        sent.last_steps, sent.last_values = last_steps, last_values
        self._tails.pop(journal.directory, None)

    def _send_params_and_tags(self, journal: Journal, run_id: str) -> None:
        from mlflow.entities import Param, RunTag

        wanted, sent = journal.wanted, journal.sent
        with journal.lock:
            params = {_name(key): _value(value) for key, value in wanted.params.items()}
            tags = {_name(key): _value(value) for key, value in wanted.tags.items()}
        # Parameters cannot change in MLflow; what a resumed run changed is noted as a tag.
        for key, value in params.items():
            if sent.params.get(key, value) != value:
                tags[f"changed.{key}"] = value
        new_params = [Param(k, v) for k, v in params.items() if k not in sent.params]
        new_tags = [RunTag(k, v) for k, v in tags.items() if sent.tags.get(k) != v]
        for first in range(0, max(len(new_params), len(new_tags)), MAX_PARAMS_PER_BATCH):
            param_batch = new_params[first : first + MAX_PARAMS_PER_BATCH]
            tag_batch = new_tags[first : first + MAX_PARAMS_PER_BATCH]
            self._offer(self._client.log_batch, run_id, params=param_batch, tags=tag_batch)
            with journal.confirming() as sent:
                sent.params.update({param.key: param.value for param in param_batch})
                sent.tags.update({tag.key: tag.value for tag in tag_batch})

    def _send_datasets(self, journal: Journal, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        with journal.lock:
            datasets = list(journal.wanted.datasets)
        for entry in datasets:
            label = f"{entry['context']}:{entry['name']}:{entry['digest']}"
            if label in journal.sent.datasets:
                continue
            dataset = Dataset(
                name=entry["name"],
                digest=entry["digest"][:MAX_DIGEST_LENGTH],
                source_type=entry["source"],
                source=json.dumps({"source": entry["source"], "sha256": entry["digest"]}),
                profile=json.dumps({"num_rows": entry["num_rows"]}),
            )
            tag = InputTag("mlflow.data.context", entry["context"])
            given = DatasetInput(dataset, [tag])
            self._offer(self._client.log_inputs, run_id, [given])
            with journal.confirming() as sent:
                sent.datasets.append(label)

    def _feed(self, journal: Journal) -> _MetricFeed:
        if journal.directory not in self._tails:
            tail = MetricTail(journal.metric_log.path)
            self._tails[journal.directory] = _MetricFeed(
                tail,
                journal.sent.last_steps,
                journal.sent.last_values if journal.parent is None else None,
            )
        return self._tails[journal.directory]

    def _send_metrics(self, journal: Journal, run_id: str) -> None:
        feed = self._feed(journal)
        while points := feed.next_points(MAX_METRICS_PER_BATCH):
            metrics = [point for point, _ in points]
            with self._lock.held():
                self._offer(self._client.log_batch, run_id, metrics=metrics)
            feed.confirm(points)
            with journal.confirming() as sent:
                for point, logged_step in points:
                    last = sent.last_steps.get(point.key, -1)
                    sent.last_steps[point.key] = max(last, point.step)
                    if journal.parent is None:
                        sent.last_values[point.key] = (logged_step, point.value)

    def _send_artifacts(self, journal: Journal, run_id: str) -> None:
        with journal.lock:
            artifacts = dict(journal.wanted.artifacts)
        for name, folder in artifacts.items():
            path = journal.directory / name
            if not path.is_file():
                continue
            version = file_digest(path)
            if journal.sent.artifacts.get(name) == version:
                continue
            self._offer(self._client.log_artifact, run_id, str(path), folder or None)
            with journal.confirming() as sent:
                sent.artifacts[name] = version

    def _send_status(self, journal: Journal, run_id: str, revision: int) -> None:
        with journal.lock:
            status, ended_ms = journal.wanted.status, journal.wanted.ended_ms
        if status != journal.sent.status:
            if status == RUNNING:
                self._client.update_run(run_id, status=RUNNING)
            else:
                self._client.set_terminated(run_id, status, end_time=ended_ms)
            journal.sent.status = status
        if status != RUNNING and not journal.sent.complete:
            with journal.lock:
                # The caller may have asked for more while this was under way.
                journal.sent.complete = journal.revision == revision
                journal.save()

    def _offer(self, send: Callable[..., object], *args: object, **kwargs: object) -> None:
        from mlflow.exceptions import MlflowException

        try:
            send(*args, **kwargs)
        except MlflowException as fault:
            if fault.error_code not in REJECTED:
                raise
            logger.warning("MLflow refused an entry, which is left out: %s", describe_fault(fault))


class _MetricFeed:
    """The points of one metric log that the server has not had, each given out once.

    Args:
        tail: the log.
        last_steps: the newest step of each metric on the server.
        last_values: the newest value of each metric on the server, and its step in the log; a
            later value for that step is then given out too, at the next free step. With None, as
            for a job that logs some steps again when it resumes, it is passed over.
    """

    def __init__(
        self,
        tail: MetricTail,
        last_steps: dict[str, int],
        last_values: dict[str, tuple[int, float]] | None,
    ) -> None:
        self._tail = tail
        self._queued_steps = dict(last_steps)
        self._queued_values = None if last_values is None else dict(last_values)
        self._pending: list[tuple[Metric, int]] = []

    def next_points(self, limit: int) -> list[tuple[Metric, int]]:
        """Give the oldest points, each with its step in the log."""
        self._read()
        return self._pending[:limit]

    def confirm(self, points: Sequence[tuple[Metric, int]]) -> None:
        del self._pending[: len(points)]

    def count_pending(self) -> int:
        self._read()
        return len(self._pending)

    def _read(self) -> None:
        from mlflow.entities import Metric

        for record in self._tail.poll():
            for name, value in summarise_metrics(record.metrics).items():
                key = _name(name)
                step = self._free_step(key, record.step, value)
                if step is not None:
                    self._queued_steps[key] = step
                    if self._queued_values is not None:
                        self._queued_values[key] = (record.step, value)
                    point = Metric(key, value, int(record.time * 1000), step)
                    self._pending.append((point, record.step))

    def _free_step(self, key: str, step: int, value: float) -> int | None:
        """Choose the step to send a value at; None if the server has it, or needs it no more."""
        queued_step = self._queued_steps.get(key, -1)
        if self._queued_values is None or key not in self._queued_values:
            return step if step > queued_step else None
        logged_step, logged_value = self._queued_values[key]
        same = value == logged_value or (math.isnan(value) and math.isnan(logged_value))
        if step < logged_step or (step == logged_step and same):
            return None
        return max(step, queued_step + 1)


def _name(name: str) -> str:
    return _NAME_FAULTS.sub("_", name)[:250]


def _value(value: str) -> str:
    return value if len(value) <= MAX_VALUE_LENGTH else value[: MAX_VALUE_LENGTH - 4] + " ..."
