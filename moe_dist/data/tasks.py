"""What a data set asks of a model: kind of label, text columns, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moe_dist.data.metrics import METRICS, LabelSpace
from moe_dist.tasks import TASK_KINDS, TaskKind
from moe_dist.tasks.kind import DevRows, LabelKind

Kind = Literal[
    "classification", "regression", "embedding", "causal_lm", "question_answering", "seq2seq"
]
Split = Literal["train", "dev", "holdout", "distilled", "finetuned"]
"""Rows by what they are for; those that are distilled are training rows and what has no labels, and
a teacher is fine-tuned on training rows, of which a kind of task may make other samples for it."""
TRAINED_ON: tuple[Split, ...] = ("train", "distilled", "finetuned")
"""Those that are not measured on."""


@dataclass(frozen=True)
class TaskSpec:
    """A task on one or two texts.

    Attributes:
        name: short name, also the subset's name on the hub.
        kind: a key of `TASK_KINDS`.
        text_columns: one or two columns that hold the text.
        label_column: the column that holds the label.
        label_names: class names in the order of their ids; None where they are to be inferred,
            and for regression.
        metrics: names out of METRICS; the first one is the task's main metric.
        positive_label: the class that F1 of two classes is about; the second one if None.
        dev_split: the split of the hub's data set that serves as dev set.
        options: what its kind of task reads beside (`TaskKind.option_names`).
        dev_rows: what dev rows hold where they are others than training rows.
        own_label: what the label column holds where it is not what the kind says.
    """

    name: str
    kind: Kind
    text_columns: tuple[str, ...]
    label_column: str = "label"
    label_names: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    positive_label: str | None = None
    dev_split: str = "validation"
    options: Mapping[str, Any] = field(default_factory=dict)
    dev_rows: DevRows | None = None
    own_label: LabelKind | None = None

    @property
    def label(self) -> LabelKind:
        """What the label column holds."""
        return self.own_label or self.task_kind.label

    @property
    def on_dev(self) -> TaskSpec:
        """The task as dev rows have it."""
        rows = self.dev_rows
        if rows is None:
            return self
        return replace(self, text_columns=rows.text_columns, own_label=rows.label)

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head."""
        return self.task_kind.num_outputs(self.label_names)

    @property
    def task_kind(self) -> TaskKind:
        """What its kind of task is to the rest of the library."""
        return TASK_KINDS[self.kind]

    def kind_on(self, split: str) -> TaskKind:
        """Say which kind makes samples of a split's rows."""
        return self.task_kind.finetuning if split == "finetuned" else self.task_kind

    @property
    def label_space(self) -> LabelSpace:
        """What metrics know of the task."""
        if not self.task_kind.has_classes:
            return LabelSpace(None, columns=self.task_kind.columns)
        names = self.label_names or ()
        positive = 1 if self.positive_label is None else names.index(self.positive_label)
        return LabelSpace(self.num_labels, positive, names)

    @property
    def main_metric(self) -> str:
        """The metric that retention and comparisons are about."""
        return self.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """Which way the main metric is better."""
        return METRICS[self.main_metric].higher_is_better


def known_task(name: str | None, subset: str | None, kind: str | None = None) -> TaskSpec | None:
    """Find what is known of a data set by its names; None for one of somebody's own.

    Of a set that serves several kinds of task, it is the one of this kind, or else the first.
    """
    known = TASKS.get(subset or "") or TASKS.get(name or "")
    if known is not None or name not in PACKAGE_TASKS:
        return known
    tasks = PACKAGE_TASKS[name]
    task = next((task for task in tasks if task.kind == kind), tasks[0])
    return replace(task, metrics=task.metrics or TASK_KINDS[task.kind].default_metrics)


def kind_for(kind: str | None, name: str | None, subset: str | None) -> TaskKind:
    """Say what kind of task a data section is about: what it says, or what is known of the set."""
    known = known_task(name, subset)
    return TASK_KINDS[kind or (known.kind if known else "classification")]


def improves_upwards(
    kind: str | None, name: str | None, subset: str | None, metrics: Sequence[str] | None
) -> bool:
    """Say which way a data section's main metric is better, before its rows are read."""
    known = known_task(name, subset, kind)
    if not metrics and known is not None and kind in (None, known.kind):
        metrics = known.metrics
    return METRICS[(metrics or kind_for(kind, name, subset).default_metrics)[0]].higher_is_better


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

# Columns, labels and metrics as the GLUE benchmark defines them (arXiv:1804.07461).
TASKS: dict[str, TaskSpec] = {
    task.name: task
    for task in (
        TaskSpec(
            "cola",
            "classification",
            ("sentence",),
            label_names=("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
        ),
        TaskSpec("sst2", "classification", ("sentence",), label_names=("negative", "positive")),
        TaskSpec(
            "mrpc",
            "classification",
            _PAIR,
            label_names=("not_equivalent", "equivalent"),
            metrics=("f1", "accuracy"),
        ),
        TaskSpec(
            "qqp",
            "classification",
            ("question1", "question2"),
            label_names=("not_duplicate", "duplicate"),
            metrics=("f1", "accuracy"),
        ),
        TaskSpec("stsb", "regression", _PAIR, metrics=("pearson", "spearman")),
        TaskSpec(
            "mnli",
            "classification",
            ("premise", "hypothesis"),
            label_names=("entailment", "neutral", "contradiction"),
            dev_split="validation_matched",
        ),
        TaskSpec("qnli", "classification", ("question", "sentence"), label_names=_ENTAILMENT),
        TaskSpec("rte", "classification", _PAIR, label_names=_ENTAILMENT),
    )
}

# What can be made of the data packages' columns; without metrics, their kind's own.
PACKAGE_TASKS: dict[str, tuple[TaskSpec, ...]] = {
    "vader-movie-reviews": (
        TaskSpec(
            "vader-movie-reviews",
            "classification",
            ("sentence",),
            label_names=("negative", "positive"),
            metrics=(),
        ),
    ),
    "bbc-news": (
        TaskSpec(
            "bbc-news",
            "classification",
            ("title", "text"),
            label_column="topic",
            label_names=("business", "entertainment", "politics", "sports", "tech"),
            metrics=(),
        ),
        TaskSpec("bbc-news", "causal_lm", ("text",), metrics=()),
        TaskSpec(
            "bbc-news",
            "embedding",
            ("text",),
            metrics=(),
            options={"pair_columns": ("title", "text")},
        ),
        TaskSpec("bbc-news", "seq2seq", ("text",), label_column="title", metrics=()),
    ),
}
