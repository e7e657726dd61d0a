"""What a recipe says of a task, checked and joined with what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe_dist.data.labels import infer_names
from moe_dist.data.metrics import METRICS
from moe_dist.data.reading import RawSplit
from moe_dist.data.samples import column_value
from moe_dist.data.tasks import Kind, TaskSpec, known_task
from moe_dist.errors import DataError
from moe_dist.tasks import TASK_KINDS


def named_task(
    name: str | None,
    subset: str | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
    kind: Kind | None,
    metrics: Sequence[str] | None,
) -> TaskSpec:
    """Join what is given with what is known of a set; a DataError where that does not fit."""
    known = known_task(name, subset, kind)
    if known is None:
        known = TaskSpec(subset or name or "task", "classification", ())
        own = TASK_KINDS[kind or known.kind]
        known = replace(
            known,
            metrics=own.default_metrics,
            text_columns=own.text_columns,
            label_column=own.label_column,
        )
    elif kind is not None and kind != known.kind:
        known = replace(known, label_names=None, metrics=TASK_KINDS[kind].default_metrics)
    own = TASK_KINDS[kind or known.kind]
    task = replace(
        known,
        kind=kind or known.kind,
        text_columns=tuple(text_columns or known.text_columns or own.text_columns),
        label_column=label_column or known.label_column,
        label_names=tuple(map(str, label_names)) if label_names else known.label_names,
        metrics=tuple(metrics) if metrics else known.metrics,
    )
    if task.label_names and not task.task_kind.has_classes:
        raise DataError(
            f"data.label_names names classes, and data.kind={task.kind} has none",
            remedy="drop it, or set data.kind",
        )
    if own.needs_all_rows(is_training=True) and len(task.text_columns) > 1:
        raise DataError(
            f"data.kind={task.kind} reads one column of running text, and data.text_columns names "
            f"{len(task.text_columns)}: {', '.join(task.text_columns)}",
            remedy="name one of them, or write both as one text before",
        )
    if task.label_names and len(set(task.label_names)) < max(2, len(task.label_names)):
        raise DataError(
            f"data.label_names={list(task.label_names)} is no list of distinct classes",
            remedy="name two classes or more, each once",
        )
    unknown = [metric for metric in task.metrics if metric not in METRICS]
    if unknown:
        raise DataError(
            f"data.metrics: unknown {', '.join(unknown)}",
            remedy=f"choose from {', '.join(METRICS)}",
        )
    suitable = task.task_kind.metrics
    if unfit := [metric for metric in task.metrics if metric not in suitable]:
        raise DataError(
            f"data.metrics={unfit} cannot measure data.kind={task.kind}",
            remedy=f"choose from {', '.join(suitable)}, or set data.kind",
        )
    return task


def with_options(task: TaskSpec, options: Mapping[str, Any]) -> TaskSpec:
    """Keep what was given; a DataError names what the kind of task does not read."""
    given = {name: value for name, value in options.items() if value is not None}
    strange = sorted(set(given) - set(task.task_kind.option_names))
    if strange:
        raise DataError(
            f"data.{strange[0]} is not read by data.kind={task.kind}",
            remedy="remove it, or set the kind of task that reads it",
        )
    return replace(task, options={**task.options, **given})


def with_dev_rows(
    task: TaskSpec, label_column: str | None, metrics: Sequence[str] | None
) -> TaskSpec:
    """Say what dev rows hold, and measure by what suits them where nothing was asked for."""
    reads_labels = any(METRICS[metric].reads_labels for metric in metrics or ())
    has_labels = label_column is not None or reads_labels
    rows = task.task_kind.dev_rows(task.options, has_labels=has_labels)
    if rows is None:
        return task
    return replace(task, dev_rows=rows, metrics=task.metrics if metrics else rows.metrics)


def with_label_names(task: TaskSpec, split: RawSplit) -> TaskSpec:
    """Infer the names of classes from the training rows where nothing says them."""
    if not 1 <= len(task.text_columns) <= 2:
        raise DataError(
            f"data.text_columns={list(task.text_columns)}: one or two columns are needed",
            remedy=f"choose from {', '.join(split.rows[0].values)}",
        )
    if task.label_names is not None or not task.task_kind.has_classes:
        return task
    labels = ((row, column_value(row, task.label_column)) for row in split.rows)
    names = infer_names(labels, task.label_column, skip_missing=split.drops_incomplete)
    return replace(task, label_names=tuple(names))


def with_positive_label(task: TaskSpec, label: str | None) -> TaskSpec:
    """Choose the class that F1 is about; a DataError names what this means nothing to."""
    if label is None:
        return task
    names = task.label_names or ()
    if len(names) != 2:
        what = f"{len(names)} classes" if names else "regression"
        raise DataError(
            f"data.positive_label={label} chooses one of two classes, and these data are {what}",
            remedy="remove it; F1 of more classes is the mean over all of them",
        )
    if label not in names:
        raise DataError(
            f"data.positive_label={label} is no class of these data",
            remedy=f"choose from {', '.join(names)}",
        )
    if "f1" not in task.metrics:
        raise DataError(
            f"data.positive_label={label} is read by f1, and data.metrics has "
            f"{', '.join(task.metrics)}",
            remedy="add f1 to data.metrics, or remove data.positive_label",
        )
    return replace(task, positive_label=label)
