"""Reading runs back: what `moe-dist runs` and `moe-dist report` show of a store."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from moe_dist.errors import TrackingError
from moe_dist.tracking.connection import connect, database_path, describe_fault, usable
from moe_dist.tracking.histories import Points, read_histories
from moe_dist.tracking.journal import load_journal

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run

PARENT_TAG = "mlflow.parentRunId"
FILE_SCHEME = "file://"
FEW = 8
"""Of more runs it is quicker to read all of a store than to ask for each."""
SORT_PROPERTIES = {"name": "name", "status": "status", "started": "started_s"}
"""What runs are sorted by beside metrics, parameters and tags: the attribute of each."""
_PAGE = 500
_ID = re.compile(r"[0-9a-f]{1,32}")
_QUOTABLE = re.compile(r"[\w .,:/()+=-]+")


@dataclass(frozen=True)
class RecordedRun:
    """A run as the store has it.

    Attributes:
        run_id: its id.
        name: its name.
        status: `RUNNING`, `FINISHED`, `FAILED` or `KILLED`.
        started_s: Unix time.
        ended_s: Unix time; None while it runs.
        parent_id: the run that it is a child of; empty if it is none.
        experiment_id: where it lies.
        params: by name.
        metrics: the newest value of each.
        tags: those that people set, MLflow's own left out.
        artifact_uri: where its artifacts lie.
    """

    run_id: str
    name: str
    status: str
    started_s: float
    ended_s: float | None
    parent_id: str
    experiment_id: str
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifact_uri: str = ""


class RunReader:
    """Reads the runs of a store.

    Args:
        uri: its tracking URI.
        experiment: the name of an experiment to keep to; empty for all of them.

    Raises:
        TrackingError: if the store cannot be used, or has no such experiment.
    """

    def __init__(self, uri: str, experiment: str = "") -> None:
        self._uri = uri
        path = database_path(uri)
        if path is not None and not path.is_file():
            # MLflow would make an empty one.
            raise TrackingError(
                f"there is no database {path}",
                remedy="name the store with --uri or MLFLOW_TRACKING_URI, or start where it lies.",
            )
        self._client = connect(uri)
        self._all: list[RecordedRun] | None = None
        with usable(uri):
            if experiment:
                found = self._client.get_experiment_by_name(experiment)
                if found is None:
                    names = ", ".join(e.name for e in self._search_experiments())
                    raise TrackingError(
                        f"there is no experiment {experiment!r} in the store",
                        remedy=f"It has: {names}.",
                    )
                if found.lifecycle_stage == "deleted":
                    raise TrackingError(
                        f"the experiment {experiment!r} is deleted",
                        remedy="Restore it: mlflow experiments restore --experiment-id "
                        f"{found.experiment_id}.",
                    )
                self._experiments = [found.experiment_id]
            else:
                self._experiments = [e.experiment_id for e in self._search_experiments()]

    def _search_experiments(self) -> list[Experiment]:
        found: list[Experiment] = []
        token = None
        while True:
            page = self._client.search_experiments(page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def search(
        self, filter_string: str = "", *, limit: int | None = None, parents_only: bool = False
    ) -> list[RecordedRun]:
        """Find runs, newest first.

        Args:
            filter_string: in MLflow's language: `metrics.retention > 0.98 and tags.router =
                'token_gate'`.
            limit: at most so many; None for all.
            parents_only: leave out runs that are children of others.

        Returns:
            The runs.

        Raises:
            TrackingError: if the filter is not understood, or the store goes away.
        """
        found: list[RecordedRun] = []
        token = None
        while limit is None or len(found) < limit:
            try:
                page = self._client.search_runs(
                    self._experiments,
                    filter_string=filter_string,
                    max_results=_PAGE,
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
            except Exception as fault:
                raise TrackingError(
                    f"the store does not answer this search: {describe_fault(fault, self._uri)}",
                    remedy="A filter reads for example: metrics.retention > 0.98 and "
                    "params.`moe.router` = 'token_gate' and attributes.status = 'FINISHED'.",
                ) from None
            runs = [_recorded(run) for run in page]
            found += [run for run in runs if not (parents_only and run.parent_id)]
            token = page.token
            if not token:
                break
        return found[:limit]

    def find(self, names: Sequence[str]) -> dict[str, RecordedRun]:
        """Find runs by their ids, the beginnings of their ids, or their names.

        Args:
            names: of several runs of one name the newest that is no child counts.

        Returns:
            The runs that were found, by what they were asked for.
        """
        found: dict[str, RecordedRun] = {}
        for name in names:
            # MLflow's language has no way to write every name.
            if len(names) > FEW or not _QUOTABLE.fullmatch(name):
                runs = self._everything()
            else:
                runs = self.search(f"attributes.run_name = '{name}'")
                if not runs and _ID.fullmatch(name):
                    runs = self.search(f"attributes.run_id LIKE '{name}%'", limit=2)
            run = _choose(name, runs)
            if run is not None:
                found[name] = run
        return found

    def children(self, runs: Iterable[RecordedRun]) -> dict[str, list[RecordedRun]]:
        """Find the children of runs.

        Args:
            runs: the parents.

        Returns:
            Children by the parent's id, oldest first; an empty list for a run without any.
        """
        found: dict[str, list[RecordedRun]] = {run.run_id: [] for run in runs}
        if len(found) > FEW:
            below = [run for run in self._everything() if run.parent_id]
        else:
            conditions = [f"tags.`{PARENT_TAG}` = '{run_id}'" for run_id in found]
            below = [run for condition in conditions for run in self.search(condition)]
        for child in reversed(below):
            if child.parent_id in found:
                found[child.parent_id].append(child)
        return found

    def _everything(self) -> list[RecordedRun]:
        """Read all runs, once."""
        if self._all is None:
            self._all = self.search()
        return self._all

    def history(self, run: RecordedRun, metric: str) -> Points:
        """Read a metric in the order of its steps; empty if it was not logged."""
        return self.histories([(run, [metric])])[run.run_id].get(metric, [])

    def histories(
        self, wanted: Iterable[tuple[RecordedRun, Iterable[str]]]
    ) -> dict[str, dict[str, Points]]:
        """Read metrics of several runs at once, by run id and metric name.

        Points are in the order of the steps; names that were not logged are left out.
        """
        names = {
            run.run_id: [name for name in metrics if name in run.metrics] for run, metrics in wanted
        }
        with usable(self._uri):
            return read_histories(self._uri, self._client, names)

    def read_json(self, run: RecordedRun, name: str) -> dict[str, Any]:
        """Read an artifact that is a JSON document.

        Args:
            run: the run.
            name: the artifact's path.

        Returns:
            The document; empty where there is none.
        """
        local = run.artifact_uri.removeprefix(FILE_SCHEME)
        try:
            if local != run.artifact_uri:
                content = json.loads((Path(unquote(local)) / name).read_text(encoding="utf-8"))
                return content if isinstance(content, dict) else {}
            with tempfile.TemporaryDirectory(prefix="moe-dist-artifact-") as scratch:
                path = self._client.download_artifacts(run.run_id, name, scratch)
                content = json.loads(Path(path).read_text(encoding="utf-8"))
        except Exception:  # Each kind of artifact store has errors of its own for what is missing.
            return {}
        return content if isinstance(content, dict) else {}


def recorded_id(directory: Path) -> str:
    """Give the id of the run that a directory holds; empty where none was recorded."""
    journal = load_journal(directory)
    return "" if journal is None else journal.sent.run_id or ""


def sort_runs(
    runs: Sequence[RecordedRun], key: str, *, ascending: bool = False
) -> list[RecordedRun]:
    """Sort by a metric, a parameter or a property.

    Args:
        runs: the runs.
        key: a metric's name, a parameter's, or `name`, `status`, `started`.
        ascending: smallest first.

    Returns:
        The runs; those that lack it come last.
    """

    def value(run: RecordedRun) -> Any:
        if key in run.metrics:
            return run.metrics[key]
        if key in SORT_PROPERTIES:
            return getattr(run, SORT_PROPERTIES[key])
        text = run.params.get(key, run.tags.get(key))
        try:
            return None if text is None else float(text)
        except ValueError:
            return text

    having = [run for run in runs if value(run) is not None]
    texts = any(isinstance(value(run), str) for run in having)
    having.sort(key=lambda run: str(value(run)) if texts else value(run), reverse=not ascending)
    return having + [run for run in runs if value(run) is None]


def _choose(name: str, runs: Sequence[RecordedRun]) -> RecordedRun | None:
    """Choose the run that a name or an id means."""
    named = [run for run in runs if run.name == name]
    if named:
        return next((run for run in named if not run.parent_id), named[0])
    begun = [run for run in runs if run.run_id.startswith(name)]
    return begun[0] if len(begun) == 1 else None


def _recorded(run: Run) -> RecordedRun:
    info, data = run.info, run.data
    return RecordedRun(
        run_id=info.run_id,
        name=info.run_name or info.run_id[:8],
        status=info.status,
        started_s=(info.start_time or 0) / 1000,
        ended_s=None if info.end_time is None else info.end_time / 1000,
        parent_id=data.tags.get(PARENT_TAG, ""),
        experiment_id=info.experiment_id,
        params=dict(data.params),
        metrics=dict(data.metrics),
        tags={key: text for key, text in data.tags.items() if not key.startswith("mlflow.")},
        artifact_uri=info.artifact_uri or "",
    )
