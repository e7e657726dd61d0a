"""Which runs a comparison is about: directories, ids, names, and sweeps for their trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_dist.errors import MissingInputError
from moe_dist.tracking import RecordedRun, RunReader

from .views import TRIAL_TAG, RunView, curve_metrics, read_directory, read_recorded

SHORT_ID = 6


def select_runs(names: Sequence[str], *, uri: str, experiment: str = "") -> list[RunView]:
    """Read the runs that a user named.

    Args:
        names: output directories, ids (their beginning is enough) or names of runs. A sweep
            stands for its trials.
        uri: the tracking store, asked for what is no directory.
        experiment: where to look there; empty for everywhere.

    Returns:
        The runs, each once, with names that differ.

    Raises:
        MissingInputError: naming every run that was not found.
        TrackingError: if the store cannot be used.
    """
    wanted = list(dict.fromkeys(names))
    views = [read_directory(Path(name)) for name in wanted if Path(name).is_dir()]
    asked = [name for name in wanted if not Path(name).is_dir()]
    if not asked:
        return _told_apart(views)
    reader = RunReader(uri, experiment)
    found = reader.find(asked)
    missing = [name for name in asked if name not in found]
    if missing:
        raise MissingInputError(
            f"no run is called {', '.join(map(repr, missing))}, and no directory is.",
            remedy="see `moe-dist runs` for names and ids; give an output directory as "
            "OUTPUT_DIR/NAME.",
        )
    return _told_apart([*views, *_read_all(reader, list(found.values()))])


def _read_all(reader: RunReader, runs: Sequence[RecordedRun]) -> list[RunView]:
    children = reader.children(runs)
    below = [child for run in runs for child in children[run.run_id]]
    grandchildren = reader.children(below)
    chosen: dict[str, tuple[RecordedRun, list[RecordedRun]]] = {}
    for run in runs:
        trials = [
            child
            for child in children[run.run_id]
            if TRIAL_TAG in child.tags or grandchildren[child.run_id]
        ]
        for trial in trials:
            chosen[trial.run_id] = (trial, grandchildren[trial.run_id])
        if not trials:
            chosen[run.run_id] = (run, children[run.run_id])
    histories = reader.histories(
        (one, curve_metrics(one)) for run, stages in chosen.values() for one in (run, *stages)
    )
    return [read_recorded(reader, run, stages, histories) for run, stages in chosen.values()]


def _told_apart(views: Sequence[RunView]) -> list[RunView]:
    """Add something of the source to names that several runs have."""
    counts = Counter(view.name for view in views)
    return [
        view
        if counts[view.name] == 1
        else replace(view, name=f"{view.name} ({_short_source(view)})")
        for view in views
    ]


def _short_source(view: RunView) -> str:
    path = Path(view.source)
    return str(path.parent) if path.is_dir() else view.source[:SHORT_ID]
