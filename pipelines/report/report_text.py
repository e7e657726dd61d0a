"""The report for people: report.md, tables for the console, and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from moe_dist.redaction import hide_secrets

from ..console import UNDEFINED, duration, quantity
from ..markdown import markdown_table
from ..stages import evaluate
from .nearness import MAX_SAMPLES, MEASURES, drift_lines, imitation_lines
from .pays import forms_table
from .report import directed, is_higher_better, metric_key, model_names, unit_of, verdict

MAX_SPREAD = 0.5
"""A latency whose times lie further apart, by this part of the median, tells nothing."""


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
        f"a whole batch of such sequences, CPU threads: {report['num_threads']}, all models as "
        "they were trained (eager, float32) and timed in turn in one process, and in brackets what "
        "a tenth of the passes kept to.",
        "",
        *(f"**{sentence[:1].upper()}{sentence[1:]}.**\n" for sentence in latency_lines(report)),
        *(f"- {sentence}." for sentence in [*undefined_lines(report), *verdict_lines(report)]),
        "",
        *_markdown_forms(report),
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


def _markdown_forms(report: Mapping[str, Any]) -> list[str]:
    """Each model's fastest form, and whether the student pays."""
    left_out = [f"not counted as a fastest form: {line}" for line in report["pays"]["left_out"]]
    return [
        *markdown_table(*forms_table(report)),
        "",
        "Each model in the form in which it is fastest on this machine, timed in turn; ms is what "
        "a tenth of the passes kept to, and in brackets below is the same ratio for each half of "
        "the passes. Forms are left out whose answers to random texts lie further than "
        f"{report['pays']['tolerance']:g} of their length from those of eager-fp32.",
        "",
        *(f"- {sentence}." for sentence in [*pays_lines(report), *left_out]),
        "",
    ]


def pays_lines(report: Mapping[str, Any]) -> list[str]:
    """Say whether the student pays, and what would."""
    pays = report["pays"]
    return [pays["line"], *pays["advice"]]


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
        higher_is_better=is_higher_better(task),
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
        directed(_task_title(entry), is_higher_better(entry)),
        f"{entry['num_dev_samples']} {unit_of(entry)}s",
        *(_value(report[name]["metrics"][key]) for name in model_names(report)),
        _value(report[evaluate.STUDENT]["retention_by_task"][task]),
    ]


def to_tables(report: Mapping[str, Any]) -> list[Table]:
    """Draw tables: models, tasks where there are several, fastest forms, and stages."""
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
    forms = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings, rows = forms_table(report)
    for heading in headings:
        is_text = heading == "model" or "form" in heading
        forms.add_column(heading, justify="left" if is_text else "right")
    for row in rows:
        forms.add_row(*row, style="bold" if row[0] == evaluate.STUDENT else "")
    tables.append(forms)
    stages = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    stages.add_column("stage")
    stages.add_column("time", justify="right")
    for key, seconds in report["seconds"].items():
        stages.add_row(key, duration(seconds))
    stages.add_row("all", duration(sum(report["seconds"].values())), style="bold")
    return [*tables, stages]


def undefined_lines(report: Mapping[str, Any]) -> list[str]:
    """Say which figures of a report have no value, and why."""
    return [
        sentence if figure in report[name]["metrics"] else f"{name}: {sentence}"
        for name in model_names(report)
        for figure, sentence in report[name].get("undefined", {}).items()
    ]


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
        f"dev {directed(str(title), is_higher_better(report))}",
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


def _value(value: float | None) -> str:
    """A metric or retention, which is there and may be undefined."""
    return UNDEFINED if value is None else f"{value:.4f}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _shape(shape: Mapping[str, int] | None) -> str:
    # Reports of earlier versions have none.
    return "" if shape is None else f"{shape['num_layers']} × {shape['hidden_size']}"
