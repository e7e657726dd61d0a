"""Which runs a comparison is about: directories, ids, names, and sweeps for their trials."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_dist.errors import MissingInputError
from moe_dist.tracking import RecordedRun, RunReader, recorded_id

from ..search.trial_stages import CONFIRMS_TAG
from .run_summary import TRIAL_TAG, RunView, curve_metrics, holds_run, read_directory, read_recorded

SHORT_ID = 6


def select_runs(names: Sequence[str], *, uri: str, experiment: str = "") -> list[RunView]:
    """Read the runs that a user named.

    Args:
        names: output directories, ids (their beginning is enough) or names of runs. A sweep
            stands for its trials; its directory and a trial's are looked up in the store.
        uri: the tracking store, asked for what is no directory.
        experiment: where to look there; empty for everywhere.

    Returns:
        The runs, each once, with names that differ.

    Raises:
        MissingInputError: naming every run that was not found.
        TrackingError: if the store cannot be used.
    """
    views: dict[Path, RunView] = {}
    asked: dict[str, str] = {}
    for name in dict.fromkeys(names):
        path = Path(name)
        known = recorded_id(path) if _is_directory(path) else ""
        if _is_directory(path) and (holds_run(path) or (os.sep in name and not known)):
            views.setdefault(path.resolve(), read_directory(path))
        else:
            # A sweep and a trial have no recipe of their own, but the store knows them. And a run
            # may be called like a directory that has nothing to do with it.
            asked[name] = known or name
    if not asked:
        return _told_apart(list(views.values()))
    reader = RunReader(uri, experiment)
    found = reader.find(list(asked.values()))
    missing = [name for name, key in asked.items() if key not in found]
    if missing:
        raise MissingInputError(
            f"no run is called {', '.join(map(repr, missing))}, and no directory is.",
            remedy="see `moe-dist runs` for names and ids, of which a beginning that no other has "
            "is enough; give an output directory as OUTPUT_DIR/NAME.",
        )
    return _told_apart([*views.values(), *_read_all(reader, list(found.values()))])


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # Longer than a file's name may be.
        return False


def _read_all(reader: RunReader, runs: Sequence[RecordedRun]) -> list[RunView]:
    children = reader.children(runs)
    below = [child for run in runs for child in children[run.run_id]]
    grandchildren = reader.children(below)
    chosen: dict[str, tuple[RecordedRun, list[RecordedRun]]] = {}
    for run in runs:
        trials = [
            child
            for child in children[run.run_id]
            # Other seeds of a trial are no more trials; they have names of their own.
            if CONFIRMS_TAG not in child.tags
            and (TRIAL_TAG in child.tags or grandchildren[child.run_id])
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
