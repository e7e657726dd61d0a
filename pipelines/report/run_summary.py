"""What a comparison knows of one run, whether its directory or the tracking server tells it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe_dist.config.run_config import flatten_settings
from moe_dist.data.metrics import METRICS
from moe_dist.data.retention import ratio_interval
from moe_dist.errors import MissingInputError
from moe_dist.metric_log import METRIC_LOG, MetricLog
from moe_dist.tracking import RecordedRun, RunReader, flatten, summarise_metrics

from ..chain.chain import RECIPE_NAME
from ..chain.stage_recovery import FINISHED
from ..chain.workspace import COMPARE_DIRECTORY
from ..search.trial_stages import TRIAL_PREFIX
from ..stages import distill, evaluate
from . import report
from .documents import clean_loads, clean_report, number

TRIAL_TAG = "trial"
QUALITY = "quality"

Series = tuple[list[int], list[float]]
CURVE_PREFIXES = ("train/loss/", "dev/", "holdout/", "moe/load_imbalance_worst")
# They say where and under which name a run was recorded, not what it did.
PRIVATE_PARAMS = ("name", "output_dir", "tracking")


@dataclass(frozen=True)
class ModelView:
    """One student of a run.

    Attributes:
        label: the comparison; empty for the main student.
        entry: its part of the run's report.
        retention: the part of the teacher's main metric that it keeps; None where it is not known.
        interval: of the retention, from the paired bootstrap, the teacher held fixed.
    """

    label: str
    entry: Mapping[str, Any]
    retention: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class RunView:
    """One run.

    Attributes:
        name: its name, made different from those of the other runs.
        source: its directory or its id.
        status: in MLflow's words.
        params: settings by dotted name.
        main_metric: what quality is measured by; empty where nothing was evaluated.
        metric_title: what people call it.
        higher_is_better: which way it is better.
        teacher: the teacher's part of the report.
        models: the students, the main one first.
        curves: steps and values by label and metric.
        loads: each expert's share by model and layer.
        seconds: working time of each stage.
    """

    name: str
    source: str
    status: str
    params: Mapping[str, str]
    main_metric: str = ""
    metric_title: str = ""
    higher_is_better: bool = True
    teacher: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[ModelView] = ()
    curves: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    loads: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def quality(self) -> float | None:
        """The main student's main metric; None where it was not evaluated."""
        return quality(self.models[0].entry, self.main_metric) if self.models else None


def quality(entry: Mapping[str, Any], metric: str) -> float | None:
    """Read a model's main metric; None where it is missing or no number."""
    return number(entry.get("metrics", {}).get(metric))


def holds_run(directory: Path) -> bool:
    """Tell whether a directory is the output of a chain: whether it has a recipe."""
    return (directory / RECIPE_NAME).is_file()


def read_directory(directory: Path) -> RunView:
    """Read a run from `output_dir/name`; a MissingInputError if none left its files there."""
    if not holds_run(directory):
        raise MissingInputError(
            f"{directory} is no run's directory: it has no {RECIPE_NAME}.",
            remedy="give OUTPUT_DIR/NAME of a run, its MLflow run id, or its name.",
        )
    recipe = _read_recipe(directory / RECIPE_NAME)
    found = read_json(directory / report.JSON_NAME)
    measured = read_json(directory / evaluate.NAME / FINISHED)
    places = {"": directory / distill.NAME}
    places |= {
        path.parent.name: path
        for path in sorted((directory / COMPARE_DIRECTORY).glob(f"*/{distill.NAME}"))
    }
    return _view(
        name=str(recipe.get("name", directory.name)),
        source=str(directory),
        status="FINISHED" if found else "UNFINISHED",
        # As the chain gives them to the tracking server, so that both sources can be compared.
        params=flatten(flatten_settings(recipe)),
        found=found,
        measured=measured,
        curves={label: _read_curves(path / METRIC_LOG) for label, path in places.items()},
    )


def curve_metrics(run: RecordedRun) -> list[str]:
    """List the metrics that are drawn as learning curves."""
    return [name for name in run.metrics if name.startswith(CURVE_PREFIXES)]


def read_recorded(
    reader: RunReader,
    run: RecordedRun,
    children: Sequence[RecordedRun],
    histories: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
) -> RunView:
    """Read a run from the tracking server.

    Args:
        reader: the connection.
        run: the chain's run.
        children: those of its stages; of several for one stage the newest counts.
        histories: how the `curve_metrics` of all of them went, by run id.

    Returns:
        What the server knows.
    """
    stages = {child.name: child for child in children}
    curves: dict[str, dict[str, Series]] = {}
    for name, child in stages.items():
        stage, _, label = name.partition("/")
        if stage == distill.NAME:
            curves[label] = _curves(histories[child.run_id])
    if not curves:
        # Trials of earlier versions trained in their own run.
        curves[""] = _curves(histories[run.run_id])
    evaluated = stages.get(evaluate.NAME)
    is_trial = TRIAL_TAG in run.tags
    return _view(
        name=run.name,
        source=run.run_id,
        status=run.status,
        params=run.params,
        found=trial_report(run) if is_trial else reader.read_json(run, report.JSON_NAME),
        measured={} if evaluated is None or is_trial else reader.read_json(evaluated, FINISHED),
        curves=curves,
    )


def trial_report(run: RecordedRun) -> dict[str, Any]:
    """Bring a trial's metrics, such as `trial/flops`, into a report's form; empty without any."""
    found = {
        name.removeprefix(TRIAL_PREFIX): value
        for name, value in run.metrics.items()
        if name.startswith(TRIAL_PREFIX)
    }
    if QUALITY not in found:
        return {}
    # The sweep gives the main metric twice, once by its own name.
    named = [name for name in METRICS if found.get(name) == found[QUALITY]]
    metric = named[0] if named else QUALITY
    entry: dict[str, Any] = {"metrics": {metric: found[QUALITY]}}
    if "active_parameters" in found:
        entry["parameters"] = {"active": found["active_parameters"]}
    if "flops" in found:
        entry["flops_per_token"] = found["flops"]
    if "latency" in found:
        entry["latency_ms"] = {run.params.get("search.latency_batch_size", "1"): found["latency"]}
    if "retention" in found:
        entry["retention"] = found["retention"]
    return {
        "main_metric": metric,
        "higher_is_better": metric not in METRICS or METRICS[metric].higher_is_better,
        evaluate.STUDENT: entry,
        "comparisons": [],
        "differences": {},
    }


def _view(
    *,
    name: str,
    source: str,
    status: str,
    params: Mapping[str, str],
    found: Mapping[str, Any],
    measured: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Series]],
) -> RunView:
    found = clean_report(found)
    teacher = found.get(evaluate.TEACHER, {})
    metric = found.get("main_metric", "")
    higher_is_better = bool(found.get("higher_is_better", True))
    models = []
    if found:
        for label in ("", *found["comparisons"]):
            entry = found[label or evaluate.STUDENT]
            difference = None if label else found["differences"].get(evaluate.TEACHER)
            models.append(
                ModelView(
                    label,
                    entry,
                    entry.get("retention"),
                    _interval(teacher, difference, higher_is_better=higher_is_better),
                )
            )
    return RunView(
        name=name,
        source=source,
        status=status,
        params={key: text for key, text in params.items() if not _is_private(key)},
        main_metric=metric,
        metric_title=found["metric_titles"].get(metric, metric) if found else "",
        higher_is_better=higher_is_better,
        teacher=teacher,
        models=tuple(models),
        curves={label: dict(series) for label, series in curves.items() if series},
        loads=clean_loads(measured),
        seconds=found.get("seconds", {}),
    )


def _interval(
    teacher: Mapping[str, Any], difference: Mapping[str, Any] | None, *, higher_is_better: bool
) -> tuple[float, float] | None:
    """Turn the interval of a difference to the teacher into one of the retention."""
    if difference is None:
        return None
    base = quality(teacher, str(difference.get("metric")))
    low, high = difference["low"], difference["high"]
    return ratio_interval(low, high, base, higher_is_better=higher_is_better)


def _is_private(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in PRIVATE_PARAMS)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict):
        raise MissingInputError(
            f"{path} is no recipe that can be read.",
            remedy="give the output directory of another run, or a run's id or name.",
        )
    return recipe


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run; empty where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_curves(log: Path) -> dict[str, Series]:
    points: dict[str, dict[int, float]] = {}
    for record in MetricLog(log).read():
        for name, value in summarise_metrics(record.metrics).items():
            if name.startswith(CURVE_PREFIXES):
                points.setdefault(name, {})[record.step] = value
    return {name: _series(list(values.items())) for name, values in points.items()}


def _curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Series]:
    return {metric: _series(points) for metric, points in history.items()}


def _series(points: Sequence[tuple[int, float]]) -> Series:
    finite = [(step, number(value)) for step, value in points]
    return [step for step, _ in points], [math.nan if y is None else y for _, y in finite]
