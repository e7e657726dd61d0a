"""Files of a sweep for other programs: best.yaml and trials.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_dist.redaction import hide_secrets
from moe_dist.search.trials import Trial
from moe_dist.tracking import scrub
from moe_dist.whole_files import whole_file

from .sweep import SweepResult, best_settings
from .trial import choosing_split
from .weight_history import history_remarks, history_words, took_over_weights

BEST_NAME, PARQUET_NAME = "best.yaml", "trials.parquet"
TRACKED_DIRECTORY = "tracked"
"""Copies that go to the tracking server in place of files that name this machine."""
ROWS = {"dev": "dev rows", "holdout": "rows withheld from training"}


def write_best(result: SweepResult, best: Trial) -> Path:
    """Write the recipe of a trial, as `compress` takes it.

    Args:
        result: the sweep.
        best: the trial.

    Returns:
        The copy for the tracking server, without paths of this machine. In neither is a password
        of `tracking.uri`: to run the file again, give the address anew.
    """
    from ..chain.workspace import Workspace
    from ..console import Console

    workspace = Workspace(result.config, Console(quiet=True))
    num_steps = workspace.num_steps(result.config.teacher_train, "finetuned")
    settings = best_settings(result.config, best, num_steps)
    reached = ", ".join(f"{name} {value:.4g}" for name, value in best.metrics.items())
    head = (
        f"# Trial {best.number} of the search over {result.config.name}: {reached}, on the "
        f"{ROWS[choosing_split(result.config)]}.\n"
        "# The teacher is the sweep's own: `moe-dist compress` finds it finished.\n"
    )
    head += "".join(f"# {line}\n" for line in history_remarks(best))
    shared = result.directory / TRACKED_DIRECTORY / BEST_NAME
    for path, content in ((result.directory / BEST_NAME, settings), (shared, scrub(settings))):
        text = head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        with whole_file(path) as beside:
            beside.write_text(hide_secrets(text), encoding="utf-8")
    return shared


def write_table(trials: Sequence[Trial], path: Path) -> Path:
    """Write a row for each trial into a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    names = sorted({name for trial in trials for name in trial.overrides})
    measures = sorted({name for trial in trials for name in trial.metrics})
    columns: dict[str, list[Any]] = {
        "trial": [trial.number for trial in trials],
        "status": [trial.status for trial in trials],
        "steps": [trial.steps_done for trial in trials],
        "num_steps": [trial.num_steps for trial in trials],
        "seconds": [trial.seconds for trial in trials],
        "message": [trial.message for trial in trials],
        "curve": [
            [{"step": r.step, "metrics": list(r.metrics.items())} for r in trial.reports]
            for trial in trials
        ],
    }
    if any(map(took_over_weights, trials)):
        columns["weight_history"] = [history_words(trial) for trial in trials]
    columns |= {name: _column([trial.overrides.get(name) for trial in trials]) for name in names}
    columns |= {name: [trial.metrics.get(name) for trial in trials] for name in measures}
    kinds = pyarrow.list_(
        pyarrow.struct(
            [
                ("step", pyarrow.int64()),
                ("metrics", pyarrow.map_(pyarrow.string(), pyarrow.float64())),
            ]
        )
    )
    table = pyarrow.table(
        {
            name: pyarrow.array(values, type=kinds if name == "curve" else None)
            for name, values in columns.items()
        }
    )
    with whole_file(path) as beside:
        parquet.write_table(table, beside)
    return path


def _column(values: Sequence[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    numbers = kinds <= {int, float}
    if numbers and float in kinds:
        return [None if value is None else float(value) for value in values]
    plain = len(kinds) <= 1 and kinds <= {int, float, str, bool}
    return list(values) if plain else [None if v is None else str(v) for v in values]
