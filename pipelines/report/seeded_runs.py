"""What `evaluate` kept of finished runs, to be compared with those of other seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_dist.data.metrics import (
    METRICS,
    LabelSpace,
    compute_metrics,
    explain_undefined,
    metric_title,
)
from moe_dist.data.retention import why_no_ratio
from moe_dist.errors import MissingInputError

from ..stages import evaluate
from .nearness import FILE_NAME, MEASURES, load_imitation
from .report import JSON_NAME
from .run_summary import read_json

if TYPE_CHECKING:
    from moe_dist.jobs.results import SavedPredictions


@dataclass(frozen=True)
class SeededRun:
    """One run of a recipe, or one task of a run with several.

    Attributes:
        directory: where it lies.
        task: its data set's name.
        metric: the main metric, or one of `imitation.MEASURES`.
        answers: the final models' answers on the dev rows, by label, and those of students
            before distillation under `LABEL/before_distillation`; of a measure of imitation their
            predictions are the errors.
        flops_ratios: each student's active feed-forward FLOPs over its teacher's.
        space: the task's classes.
    """

    directory: Path
    task: str
    metric: str
    answers: Mapping[str, SavedPredictions]
    flops_ratios: Mapping[str, float | None]
    space: LabelSpace

    @cached_property
    def qualities(self) -> dict[str, float]:
        """The metric of each entry of `answers`."""
        if self.metric in MEASURES:
            return {name: float(found.predictions.mean()) for name, found in self.answers.items()}
        return {
            name: compute_metrics([self.metric], self.said(name), found.labels, self.space)[
                self.metric
            ]
            for name, found in self.answers.items()
        }

    def said(self, label: str) -> Any:
        """A model's predictions, its figures, or its errors."""
        found = self.answers[label]
        has_figures = self.space.columns and self.metric not in MEASURES
        return found.logits if has_figures else found.predictions

    def undefined(self, label: str) -> str | None:
        """Say why a model's quality or retention has no value; None where they have."""
        value, teacher = self.qualities[label], self.qualities[evaluate.TEACHER]
        if math.isnan(value):
            labels = self.answers[label].labels
            why = explain_undefined(self.metric, self.said(label), labels, self.space)
            return f"{self.title} of {label} in {self.directory} is undefined: {why}"
        if label == evaluate.TEACHER or self.metric in MEASURES:
            return None
        why = why_no_ratio(value, teacher, self.title, higher_is_better=self.higher_is_better)
        if why is None:
            return None
        return f"retention of {label} in {self.directory} is undefined: {why}"

    @property
    def title(self) -> str:
        """What people call the metric."""
        if self.metric in MEASURES:
            return self.metric
        return metric_title(self.metric, self.space)

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric is better."""
        return self.metric not in MEASURES and METRICS[self.metric].higher_is_better

    @property
    def in_hundredths(self) -> bool:
        """Whether people read the metric in hundredths."""
        return self.metric in MEASURES or METRICS[self.metric].is_fraction

    @property
    def labels(self) -> list[str]:
        """The models after training, the teacher first."""
        return [name for name in self.answers if not name.endswith(f"/{evaluate.BEFORE}")]


def read_runs(
    directory: Path, *, before: bool = False, measure: str | None = None
) -> list[SeededRun]:
    """Read what `evaluate` kept of a finished run.

    Args:
        directory: OUTPUT_DIR/NAME.
        before: take the students as they were before distillation.
        measure: one of `imitation.MEASURES`, to be read in place of the task's metric.

    Returns:
        Its models' answers, for each of its tasks.

    Raises:
        MissingInputError: if the run is not finished, or was measured without that.
        CheckpointError: if a file is damaged.
    """
    report = read_json(directory / JSON_NAME)
    if not report:
        raise MissingInputError(
            f"{directory} holds no finished run", remedy="let `moe-dist compress` finish it"
        )
    place = directory / evaluate.NAME / evaluate.PREDICTIONS
    names = [evaluate.TEACHER, evaluate.STUDENT, *report["comparisons"]]
    ratios = {name: report[name].get("ffn_flops_ratio") for name in names}
    if "tasks" in report:
        parts = {task: (place / task, entry) for task, entry in report["tasks"].items()}
    else:
        parts = {str(report["data"]["name"]): (place, report)}
    runs = []
    for task, (own_place, entry) in parts.items():
        answers = _load_answers(own_place, names, before=before)
        metric = measure or str(entry["main_metric"])
        space = _label_space(entry, answers[evaluate.TEACHER])
        if measure is not None:
            answers = _load_errors(own_place, measure, answers, before=before)
        runs.append(SeededRun(directory, task, metric, answers, ratios, space))
    return runs


def _label_space(entry: Mapping[str, Any], answers: SavedPredictions) -> LabelSpace:
    """The task's classes; a report of an earlier version names none, and means the second one."""
    if columns := entry.get("columns"):
        return LabelSpace(None, columns=tuple(columns))
    if np.issubdtype(answers.labels.dtype, np.floating):
        return LabelSpace(None)
    classes = entry.get("classes") or {}
    return LabelSpace(
        answers.logits.shape[1], int(classes.get("positive", 1)), tuple(classes.get("names", ()))
    )


def _load_errors(
    place: Path, measure: str, answers: Mapping[str, SavedPredictions], *, before: bool
) -> dict[str, SavedPredictions]:
    """The models' errors in place of their answers; the teacher's are 0."""
    errors = load_imitation(place / FILE_NAME)[measure]
    if not errors:
        raise MissingInputError(
            f"{place} holds no {measure}",
            remedy="run the recipe again with this version: `evaluate` then measures it, and all "
            "that is trained stays; a student of another depth or width has none",
        )
    found = {}
    for name, one in answers.items():
        key = f"{name}/{evaluate.BEFORE}" if before and name != evaluate.TEACHER else name
        own = errors.get(key)
        if name == evaluate.TEACHER:
            own = np.zeros(len(next(iter(errors.values()))), dtype=np.float32)
        if own is not None:
            count = len(own)
            found[name] = replace(
                one,
                logits=one.logits[:0],
                predictions=own,
                labels=one.labels[:count],
                sample_ids=one.sample_ids[:count],
            )
    return found


def _load_answers(
    place: Path, names: Sequence[str], *, before: bool
) -> dict[str, SavedPredictions]:
    from moe_dist.jobs.results import load_predictions

    answers = {evaluate.TEACHER: load_predictions(place / f"{evaluate.TEACHER}.npz")}
    for name in names[1:]:
        early = place / f"{name}-{evaluate.BEFORE}.npz"
        answers[name] = load_predictions(early if before else place / f"{name}.npz")
        if early.exists() and not before:
            answers[f"{name}/{evaluate.BEFORE}"] = load_predictions(early)
    return answers
