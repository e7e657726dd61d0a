"""The chain's report as a document: what report.json holds, and which model beats which."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from moe_dist.data.retention import ratio, why_no_ratio

from ..chain.stage import StageResult
from ..console import signed
from ..stages import evaluate
from .pays import judge_speed, speed_metrics

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

SCHEMA_VERSION = 1
JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"

RESERVED_LABELS = frozenset(
    {
        "schema_version",
        "name",
        "created_at",
        "main_metric",
        "metric_titles",
        "higher_is_better",
        "classes",
        "columns",
        "unit",
        "distances",
        "data",
        "retention",
        "seconds",
        "mlflow",
        "seq_len",
        "num_threads",
        "other_work",
        "training",
        "tasks",
        "comparisons",
        "differences",
        "imitation_differences",
        "verdicts",
        "pays",
        evaluate.TEACHER,
        evaluate.STUDENT,
    }
)
"""A comparison cannot be called so: each has its entry beside these keys."""


def build_report(
    config: RunConfig, results: Mapping[str, StageResult], *, run_id: str | None
) -> dict[str, Any]:
    """Join what the stages found into one document; docs/architecture.md lists its keys.

    `results` by the stage's key; `run_id` of the chain's MLflow run, None without tracking.
    """
    measured = results[evaluate.NAME].details
    models = {name: dict(entry) for name, entry in measured["models"].items()}
    metric = measured["main_metric"]
    higher_is_better = is_higher_better(measured)
    teacher = models[evaluate.TEACHER]
    tasks = measured.get("tasks", {})
    titles = measured.get("metric_titles", {})
    for name, entry in models.items():
        if name != evaluate.TEACHER:
            _add_retention(entry, teacher["metrics"], measured)
            flops = entry["ffn_flops_per_token"], teacher["ffn_flops_per_token"]
            entry["ffn_flops_ratio"] = ratio(*flops, higher_is_better=True)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "main_metric": metric,
        "metric_titles": titles,
        "higher_is_better": higher_is_better,
        "classes": measured.get("classes"),
        "columns": measured.get("columns"),
        "unit": unit_of(measured),
        "distances": measured.get("distances", []),
        "data": {**measured["data"], "num_dev_samples": measured["num_dev_samples"]},
        "seq_len": measured["seq_len"],
        "num_threads": measured["num_threads"],
        "other_work": measured["other_work"],
        "pays": judge_speed(models, measured["speeds"], required=config.evaluate.require_speedup),
        "retention": models[evaluate.STUDENT]["retention"],
        "seconds": {key: round(result.seconds, 2) for key, result in results.items()},
        "training": {
            key: dict(result.details)
            for key, result in results.items()
            if "num_steps" in result.details
        },
        "mlflow": {"run_id": run_id, "experiment": config.tracking.experiment},
        **models,
        **({"tasks": tasks} if tasks else {}),
        "comparisons": [name for name in config.compare if name in models],
        "differences": measured["differences"],
        "imitation_differences": measured.get("imitation_differences", {}),
        "verdicts": {
            name: verdict(
                name,
                entry,
                measured["num_dev_samples"],
                titles.get(metric),
                higher_is_better=higher_is_better,
                unit=unit_of(measured),
            )
            for name, entry in measured["differences"].items()
        },
    }


def _add_retention(
    entry: dict[str, Any],
    teacher: Mapping[str, float | None],
    measured: Mapping[str, Any],
) -> None:
    """Note a student's part of the teacher's main metric; of several tasks the mean of theirs."""
    own, reasons = entry["metrics"], {}
    tasks, titles = measured.get("tasks", {}), measured.get("metric_titles", {})

    def part(place: str, key: str, about: Mapping[str, Any]) -> float | None:
        higher_is_better = is_higher_better(about)
        title = titles.get(key, key)
        why = why_no_ratio(own[key], teacher[key], title, higher_is_better=higher_is_better)
        if why is not None:
            reasons[place] = f"{place} is undefined: {why}"
        return ratio(own[key], teacher[key], higher_is_better=higher_is_better)

    if not tasks:
        entry["retention"] = part("retention", measured["main_metric"], measured)
    else:
        by_task = {
            task: part(f"retention/{task}", metric_key(task, found), found)
            for task, found in tasks.items()
        }
        entry["retention_by_task"] = by_task
        known = [value for value in by_task.values() if value is not None]
        entry["retention"] = sum(known) / len(known) if len(known) == len(by_task) else None
        if entry["retention"] is None:
            reasons["retention"] = f"retention is undefined: {', '.join(reasons)} is"
    if reasons:
        entry["undefined"] = entry.get("undefined", {}) | reasons


def metric_key(task: str, entry: Mapping[str, Any]) -> str:
    """Name a task's main metric among a model's metrics, for example `sst2/accuracy`."""
    return f"{task}/{entry['main_metric']}"


def is_higher_better(entry: Mapping[str, Any]) -> bool:
    """Which way a main metric is better; an earlier version had none that is better the lower."""
    return bool(entry.get("higher_is_better", True))


def unit_of(entry: Mapping[str, Any]) -> str:
    """What a dev sample is: what an interval resamples."""
    return str(entry.get("unit", "sample"))


def directed(title: str, higher_is_better: bool) -> str:
    """Say of a metric that lower is better, which of most is not so."""
    return title if higher_is_better else f"{title} (lower is better)"


def verdict(
    other: str,
    entry: Mapping[str, Any],
    num_samples: int,
    title: str | None = None,
    *,
    higher_is_better: bool,
    unit: str,
) -> str:
    """Say which of two models is better, and how sure that is.

    Args:
        other: the model that the student is compared with.
        entry: the student's metric minus the other's, with the interval of the paired bootstrap,
            or why it is `undefined`.
        num_samples: dev samples (documents, questions) behind it.
        title: what people call the metric; its own name if None.
        higher_is_better: which way the metric is better.
        unit: what a dev sample is.

    Returns:
        A sentence. One beats the other where the whole interval lies on its side of 0.
    """
    pair = f"{evaluate.STUDENT} and {other}"
    if "undefined" in entry:
        return f"{pair} cannot be compared: {entry['undefined']}"
    if entry["low"] > 0 or entry["high"] < 0:
        is_ahead = (entry["low"] > 0) == higher_is_better
        first, second = (evaluate.STUDENT, other) if is_ahead else (other, evaluate.STUDENT)
        claim = f"{first} beats {second}"
    else:
        claim = f"{pair} cannot be told apart"
    left_out = entry.get("num_undefined", 0)
    called = directed(title or entry["metric"], higher_is_better)
    difference, low, high = signed(entry["difference"], entry["low"], entry["high"])
    return (
        f"{claim} on {num_samples} dev {unit}s ({called} of {evaluate.STUDENT} minus {other}: "
        f"{difference}, {round(100 * entry.get('confidence', 0.95))} % interval {low} to {high}"
        + (f"; {left_out} resamples where it is undefined are left out" if left_out else "")
        + "; one training run of each, so another seed may say otherwise)"
    )


def headline_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Pick the figures that the chain's own run shows."""
    chosen: dict[str, float] = {}
    if report["retention"] is not None:
        chosen["retention"] = report["retention"]
    for task, value in report[evaluate.STUDENT].get("retention_by_task", {}).items():
        if value is not None:
            chosen[f"retention/{task}"] = value
    for name in model_names(report):
        entry = report[name]
        for metric, value in entry["metrics"].items():
            if value is not None:
                chosen[f"{name}/{metric}"] = value
        chosen[f"{name}/parameters_active"] = entry["parameters"]["active"]
        chosen[f"{name}/flops_per_token"] = entry["flops_per_token"]
        for measure, value in entry.get("imitation", {}).items():
            if value is not None:
                chosen[f"{name}/{measure}"] = value
        for size, value in entry["latency_ms"].items():
            chosen[f"{name}/latency_ms_batch_{size}"] = value
    return chosen | speed_metrics(report, model_names(report))


def model_names(report: Mapping[str, Any]) -> list[str]:
    """List the models of a report, teacher and student first."""
    return [evaluate.TEACHER, evaluate.STUDENT, *report["comparisons"]]
