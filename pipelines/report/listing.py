"""The list of runs, and their comparison, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from difflib import get_close_matches
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from moe_dist.errors import MissingInputError
from moe_dist.tracking import SORT_PROPERTIES, RecordedRun, RunReader, sort_runs

from ..console import duration
from .documents import shown
from .page import differing_params, result_rows
from .run_summary import RunView

SHORT_ID = 8
TAG_COLUMNS = ("router", "partition")
METRIC_COLUMNS = ("retention",)


@dataclass(frozen=True)
class Listing:
    """What to list.

    Attributes:
        where: in MLflow's search language.
        sort: a metric, parameter, tag or property.
        ascending: smallest first.
        limit: at most so many.
        everything: children too.
        columns: further metrics, parameters or tags.
    """

    where: str = ""
    sort: str = "started"
    ascending: bool = False
    limit: int = 30
    everything: bool = False
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A run in the list.

    Attributes:
        run: the run.
        depth: 0 for one that is nobody's child.
    """

    run: RecordedRun
    depth: int = 0

    def as_plain(self) -> dict[str, Any]:
        """Give everything that the store says of the run."""
        return asdict(self.run)


def list_runs(uri: str, experiment: str, listing: Listing) -> list[Entry]:
    """Find the runs to list.

    Args:
        uri: the tracking store.
        experiment: its name; empty for all.
        listing: what to list.

    Returns:
        Parents in the chosen order, each followed by its children where they are wanted.

    Raises:
        TrackingError: if the store cannot be used, or the filter is not understood.
    """
    reader = RunReader(uri, experiment)
    newest = listing.sort == "started" and not listing.ascending and not listing.everything
    found = reader.search(
        listing.where,
        limit=listing.limit if newest else None,
        parents_only=not listing.everything,
    )
    if found:
        _check_key(listing.sort, found)
    ordered = sort_runs(found, listing.sort, ascending=listing.ascending)
    if not listing.everything:
        return [Entry(run) for run in ordered[: listing.limit]]
    ids = {run.run_id for run in found}
    children: dict[str, list[RecordedRun]] = {}
    for run in reversed(found):
        children.setdefault(run.parent_id, []).append(run)
    entries: list[Entry] = []

    def visit(run: RecordedRun, depth: int) -> None:
        entries.append(Entry(run, depth))
        for child in children.get(run.run_id, []):
            visit(child, depth + 1)

    roots = [run for run in ordered if run.parent_id not in ids]
    for run in roots[: listing.limit]:
        visit(run, 0)
    return entries


def _check_key(key: str, runs: Sequence[RecordedRun]) -> None:
    known = {*SORT_PROPERTIES}
    for run in runs:
        known |= {*run.metrics, *run.params, *run.tags}
    if key not in known:
        near = get_close_matches(key, known)
        raise MissingInputError(
            f"none of these runs has {key!r}, which they are to be sorted by.",
            remedy=f"did you mean {' or '.join(near)}?"
            if near
            else "name a metric, a parameter or a tag of theirs.",
        )


def list_tables(entries: Sequence[Entry], listing: Listing) -> list[Table]:
    """Draw the list; a MissingInputError if there is nothing in it."""
    if not entries:
        raise MissingInputError(
            "no run matches.",
            remedy="leave out --filter or --experiment, or name another store with --uri.",
        )
    metrics = [name for name in METRIC_COLUMNS if any(name in e.run.metrics for e in entries)]
    # What students reach goes under the name of the task's own metric.
    metrics += sorted(
        {
            name
            for entry in entries
            for name in entry.run.metrics
            if name.startswith("student/")
            and "latency" not in name
            and "param" not in name
            and "flops" not in name
        }
    )
    tags = [name for name in TAG_COLUMNS if any(name in e.run.tags for e in entries)]
    extra = [listing.sort] if listing.sort not in ("started", "name", "status") else []
    columns = list(dict.fromkeys([*tags, *metrics, *extra, *listing.columns]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "id", "state", "started", "time"):
        table.add_column(name, no_wrap=name in ("run", "id", "started"))
    for name in columns:
        table.add_column(_text(name), justify="right" if name not in tags else "left")
    for entry in entries:
        run = entry.run
        table.add_row(
            _text(f"{'  ' * entry.depth}{run.name}"),
            _text(run.run_id[:SHORT_ID]),
            run.status.lower(),
            datetime.fromtimestamp(run.started_s).strftime("%Y-%m-%d %H:%M"),
            "" if run.ended_s is None else duration(run.ended_s - run.started_s),
            *(_text(_shown(run, name)) for name in columns),
        )
    return [table]


def comparison_tables(views: Sequence[RunView]) -> list[Table]:
    """Draw what differs between runs, a column for each, and results, a row for each student."""
    settings = Table(
        title="what differs", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    settings.add_column("setting")
    for view in views:
        settings.add_column(_text(view.name), overflow="fold")
    for key in differing_params(views):
        settings.add_row(_text(key), *(_text(view.params.get(key, "")) for view in views))
    columns, rows = result_rows(views, {})
    results = Table(
        title="what came out", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    results.add_column("student", overflow="fold")
    for name in columns:
        results.add_column(_text(name), justify="right")
    for row in rows:
        results.add_row(_text(row.name), *(_text(cell.text) for cell in row.cells))
    return [settings, results]


def comparison_json(views: Sequence[RunView]) -> dict[str, Any]:
    """Give what differs and what came out as plain values.

    `differing` names of settings, and for each run `name`, `source`, `params` (those only),
    `teacher` and its students under `models`.
    """
    differing = differing_params(views)
    return {
        "differing": differing,
        "runs": [
            {
                "name": view.name,
                "source": view.source,
                "status": view.status,
                "params": {key: view.params.get(key) for key in differing},
                "main_metric": view.main_metric,
                "higher_is_better": view.higher_is_better,
                "teacher": dict(view.teacher),
                "models": [_plain_model(model.label, model) for model in view.models],
            }
            for view in views
        ],
    }


def _plain_model(label: str, model: Any) -> Mapping[str, Any]:
    return {
        "label": label or "student",
        "retention": model.retention,
        "interval": model.interval,
        **model.entry,
    }


def _text(text: str) -> Text:
    """Show a foreign text as it is, and not as markup."""
    return Text(shown(text))


def _shown(run: RecordedRun, name: str) -> str:
    if name in run.metrics:
        return f"{run.metrics[name]:.4g}"
    return run.params.get(name, run.tags.get(name, ""))
