"""The chain's report: report.json for programs, report.md for people, a table for the console."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from moe_dist.data.retention import ratio, why_no_ratio
from moe_dist.redaction import hide_secrets

from ..chain.stage import StageResult
from ..console import UNDEFINED, duration, signed
from ..markdown import markdown_table
from ..stages import evaluate
from .nearness import MAX_SAMPLES, MEASURES, drift_lines, imitation_lines

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

MAX_SPREAD = 0.5
"""A latency whose times lie further apart, by this part of the median, tells nothing."""
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
    higher_is_better = _higher_is_better(measured)
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
        higher_is_better = _higher_is_better(about)
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


def _higher_is_better(entry: Mapping[str, Any]) -> bool:
    """Which way a main metric is better; an earlier version had none that is better the lower."""
    return bool(entry.get("higher_is_better", True))


def unit_of(entry: Mapping[str, Any]) -> str:
    """What a dev sample is: what an interval resamples."""
    return str(entry.get("unit", "sample"))


def _directed(title: str, higher_is_better: bool) -> str:
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
    called = _directed(title or entry["metric"], higher_is_better)
    difference, low, high = signed(entry["difference"], entry["low"], entry["high"])
    return (
        f"{claim} on {num_samples} dev {unit}s ({called} of {evaluate.STUDENT} minus {other}: "
        f"{difference}, {round(100 * entry.get('confidence', 0.95))} % interval {low} to {high}"
        + (f"; {left_out} resamples where it is undefined are left out" if left_out else "")
        + "; one training run of each, so another seed may say otherwise)"
    )


def undefined_lines(report: Mapping[str, Any]) -> list[str]:
    """Say which figures of a report have no value, and why."""
    return [
        sentence if figure in report[name]["metrics"] else f"{name}: {sentence}"
        for name in model_names(report)
        for figure, sentence in report[name].get("undefined", {}).items()
    ]


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
    return chosen


def model_names(report: Mapping[str, Any]) -> list[str]:
    """List the models of a report, teacher and student first."""
    return [evaluate.TEACHER, evaluate.STUDENT, *report["comparisons"]]


def to_markdown(report: Mapping[str, Any]) -> str:
    """Write a report for people, in Markdown, without credentials."""
    data = report["data"]
    lines = [
        f"# {report['name']}",
        "",
        f"Data: {data['name']}, {data['num_dev_samples']} dev {unit_of(report)}s. "
        f"Made {report['created_at']}.",
        "",
        *_markdown_data(data.get("summaries", {})),
        *markdown_table(_headings(report), [_row(report, name) for name in model_names(report)]),
        "",
        *_markdown_tasks(report),
        f"FLOPs are for one token in a sequence of {report['seq_len']}; latency is the median for "
        f"a whole batch of such sequences on {report['num_threads']} CPU threads, all models "
        "timed in turn in one process, and in brackets what a tenth of the passes kept to.",
        "",
        *(f"**{sentence[:1].upper()}{sentence[1:]}.**\n" for sentence in latency_lines(report)),
        *(f"- {sentence}." for sentence in [*undefined_lines(report), *verdict_lines(report)]),
        "",
        *_markdown_gates(report),
        *_markdown_imitation(report),
        f"Intervals are from a paired bootstrap over the dev {unit_of(report)}s. One training run "
        "of each model stands behind them, so they say nothing of other seeds; `moe-dist seeds` "
        "compares several.",
        "",
        *markdown_table(
            ["stage", "time"],
            [[key, duration(seconds)] for key, seconds in report["seconds"].items()],
        ),
        "",
    ]
    if report["mlflow"]["run_id"]:
        lines += [f"MLflow run: `{report['mlflow']['run_id']}`", ""]
    return hide_secrets("\n".join(lines))


def _markdown_gates(report: Mapping[str, Any]) -> list[str]:
    """How undecided each model's gates are, and how evenly its experts are used."""
    rows = [
        [
            name,
            f"{gates['mean_entropy']:.2f} of {gates['max_entropy']:.2f}",
            f"× {gates['worst_load_imbalance']:.2f}",
        ]
        for name in model_names(report)
        if (gates := report[name].get("gates"))
    ]
    if not rows:
        return []
    head = ["gates of", "entropy, nats", "busiest expert over the mean"]
    return [
        *markdown_table(head, rows),
        "",
        "On the dev rows: entropy is the mean over layers (of merged experts over their gates), "
        "load that of the layer with the most uneven one. Of merged experts load is their part of "
        "the merges.",
        "",
    ]


def _markdown_imitation(report: Mapping[str, Any]) -> list[str]:
    """How near each student is to its teacher, and which is nearer."""
    names = [name for name in model_names(report) if "imitation" in report[name]]
    if not names:
        return []
    head = ["student"]
    for measure in MEASURES:
        words = measure.replace("_", " ")
        head += [f"{words} before distillation", words]
    rows = []
    for name in names:
        entry = report[name]
        cells = [name]
        for measure in MEASURES:
            cells.append(_optional(entry[f"imitation_{evaluate.BEFORE}"][measure]))
            cells.append(_optional(entry["imitation"][measure]))
        rows.append(cells)
    sentences = nearness_lines(report)
    return [
        f"How far students are from their teacher, on at most {MAX_SAMPLES:,} dev samples of a "
        "task. Hidden error: the part of the teacher's hidden states that is missed, mean over "
        f"layers; 0 is a copy. Prediction error: "
        f"{', or '.join(report['distances'])}.",
        "",
        *markdown_table(head, rows),
        "",
        *(f"- {sentence}." for sentence in sentences),
        *([""] if sentences else []),
    ]


def _markdown_data(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    named = [(f"{task}: " if task else "", found) for task, found in summaries.items()]
    lines = [f"- {name}{found['figures']}" for name, found in named]
    return [*lines, ""] if lines else []


def _markdown_tasks(report: Mapping[str, Any]) -> list[str]:
    """A table of the tasks, and how the student stands on each; nothing where there is one."""
    if "tasks" not in report:
        return []
    rows = [_task_row(report, task) for task in report["tasks"]]
    lines = [*markdown_table(_task_headings(report), rows), ""]
    for task, entry in report["tasks"].items():
        lines += [
            f"- {task}: {_task_verdict(name, found, entry)}."
            for name, found in entry["differences"].items()
        ]
    return [*lines, ""]


def _task_verdict(other: str, difference: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    return verdict(
        other,
        difference,
        task["num_dev_samples"],
        _task_title(task),
        higher_is_better=_higher_is_better(task),
        unit=unit_of(task),
    )


def _task_headings(report: Mapping[str, Any]) -> list[str]:
    return ["task", "metric", "dev rows", *model_names(report), "retention"]


def _task_title(entry: Mapping[str, Any]) -> str:
    metric = str(entry["main_metric"])
    return str(entry.get("metric_titles", {}).get(metric, metric))


def _task_row(report: Mapping[str, Any], task: str) -> list[str]:
    entry = report["tasks"][task]
    key = metric_key(task, entry)
    return [
        task,
        _directed(_task_title(entry), _higher_is_better(entry)),
        f"{entry['num_dev_samples']} {unit_of(entry)}s",
        *(_value(report[name]["metrics"][key]) for name in model_names(report)),
        _value(report[evaluate.STUDENT]["retention_by_task"][task]),
    ]


def to_tables(report: Mapping[str, Any]) -> list[Table]:
    """Draw the models' table, that of the tasks where there are several, and the stages'."""
    models = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, heading in enumerate(_headings(report)):
        models.add_column(heading, justify="left" if position == 0 else "right")
    for name in model_names(report):
        models.add_row(*_row(report, name), style="bold" if name == evaluate.STUDENT else "")
    tables = [models]
    if "tasks" in report:
        tasks = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for position, heading in enumerate(_task_headings(report)):
            tasks.add_column(heading, justify="left" if position < 2 else "right")
        for task in report["tasks"]:
            tasks.add_row(*_task_row(report, task))
        tables.append(tasks)
    stages = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    stages.add_column("stage")
    stages.add_column("time", justify="right")
    for key, seconds in report["seconds"].items():
        stages.add_row(key, duration(seconds))
    stages.add_row("all", duration(sum(report["seconds"].values())), style="bold")
    return [*tables, stages]


def verdict_lines(report: Mapping[str, Any]) -> list[str]:
    """Compare the student with each other model, comparisons first: they are what it must beat."""
    verdicts = report["verdicts"]
    return [verdicts[name] for name in sorted(verdicts, key=lambda name: name == evaluate.TEACHER)]


def nearness_lines(report: Mapping[str, Any]) -> list[str]:
    """Say which student is nearer to the teacher, and which left it; none in an older report."""
    return [
        *imitation_lines(report["imitation_differences"], evaluate.STUDENT),
        *drift_lines({name: report[name] for name in model_names(report)}),
    ]


def latency_lines(report: Mapping[str, Any]) -> list[str]:
    """Say where the latencies of a report cannot be relied on."""
    wide = [
        f"{name} at batch {size} ({100 * spread:.0f} %)"
        for name in model_names(report)
        for size, spread in report[name]["latency_spread"].items()
        if spread > MAX_SPREAD
    ]
    doubts = []
    if wide:
        doubts.append(
            "latency cannot be judged: the middle eight tenths of the passes lie further apart "
            f"than {100 * MAX_SPREAD:.0f} % of the median: {', '.join(wide)}"
        )
    other = report["other_work"]
    if other["disturbs"]:
        doubts.append(
            f"latency was timed beside other work, which kept {other['busy_cores']:.1f} of "
            f"{other['num_cores']} cores busy; time again on an idle machine"
        )
    return doubts


def _headings(report: Mapping[str, Any]) -> list[str]:
    title = report["metric_titles"].get(report["main_metric"], report["main_metric"])
    return [
        "model",
        f"dev {_directed(str(title), _higher_is_better(report))}",
        "before distillation",
        "retention",
        "layers × width",
        "parameters",
        "active",
        "FLOPs/token",
        "FFN FLOPs",
        *(f"ms, batch {size}" for size in report[evaluate.TEACHER]["latency_ms"]),
    ]


def _row(report: Mapping[str, Any], name: str) -> list[str]:
    entry = report[name]
    metric = report["main_metric"]
    before = entry.get(f"metrics_{evaluate.BEFORE}", {})
    return [
        name,
        _value(entry["metrics"][metric]),
        _value(before[metric]) if metric in before else "",
        _value(entry["retention"]) if "retention" in entry else "",
        _shape(entry.get("shape")),
        quantity(entry["parameters"]["total"]),
        quantity(entry["parameters"]["active"]),
        quantity(entry["flops_per_token"]),
        f"× {entry.get('ffn_flops_ratio') or 1.0:.3f}",
        *(
            f"{value:.2f} ({entry['latency_low_ms'][size]:.2f})"
            for size, value in entry["latency_ms"].items()
        ),
    ]


def quantity(count: float) -> str:
    """Write a count with a unit prefix, for example `22.7 M`."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.1f} {prefix}"
    return f"{count:.0f}"


def _value(value: float | None) -> str:
    """A metric or retention, which is there and may be undefined."""
    return UNDEFINED if value is None else f"{value:.4f}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _shape(shape: Mapping[str, int] | None) -> str:
    # Reports of earlier versions have none.
    return "" if shape is None else f"{shape['num_layers']} × {shape['hidden_size']}"
