"""The same students trained with several seeds, on one task or more: means and intervals.

One run tells a recipe's luck from its worth no better than one throw of a die. This reads what
`evaluate` kept of each run, resamples examples and seeds together, and sets Student's t over seeds
beside it: of the two the wider interval counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_dist.data.metrics import (
    METRICS,
    LabelSpace,
    compute_metrics,
    explain_undefined,
    metric_title,
)
from moe_dist.data.retention import ratio, why_no_ratio
from moe_dist.errors import DataError, MissingInputError
from moe_dist.measure.bootstrap import (
    Interval,
    Resampled,
    mean_over_tasks,
    resample_differences,
    resample_mean_differences,
)
from moe_dist.whole_files import finite

from ..console import UNDEFINED
from ..markdown import markdown_table
from ..stages import evaluate
from .nearness import FILE_NAME, MEASURES, load_imitation
from .report import JSON_NAME
from .run_summary import read_json

if TYPE_CHECKING:
    from moe_dist.jobs.results import SavedPredictions

DENSE = "dense"
# Of figures in hundredths, and of others.
_DIGITS = {True: ".1f", False: ".3f"}
MEAN = "mean over tasks"


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


@dataclass(frozen=True)
class Row:
    """One model on one task, over its seeds.

    Attributes:
        task: the data set, or MEAN.
        label: the model.
        num_seeds: runs that have it.
        flops_ratio: active feed-forward FLOPs over the teacher's.
        before: mean main metric before distillation; None for a teacher.
        metric: what people call the main metric.
        quality: its mean; NaN where it is undefined for a seed.
        spread: its standard deviation over seeds; None for fewer than two.
        retention: mean of quality over the same run's teacher's (of the teacher's over it where
            lower is better); None where it is undefined for a seed.
        differences: quality minus that of each reference; None where it is undefined.
        undefined: why quality or retention has no value; None where they have.
        higher_is_better: which way the metric is better.
        in_hundredths: whether people read it in hundredths.
    """

    task: str
    label: str
    num_seeds: int
    flops_ratio: float | None
    before: float | None
    metric: str
    quality: float
    spread: float | None
    retention: float | None
    differences: Mapping[str, Interval | None]
    undefined: str | None = None
    higher_is_better: bool = True
    in_hundredths: bool = True

    @property
    def scale(self) -> float:
        """What figures are shown times."""
        return 100.0 if self.in_hundredths else 1.0


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


def compare_seeds(runs: Sequence[SeededRun], against: Sequence[str] = ()) -> list[Row]:
    """Compare models over all seeds of each task, and over the tasks.

    Args:
        runs: finished runs, or their tasks; those of one task differ in their seed.
        against: labels that all others are compared with; `dense` where every run has it, else
            the teacher, when empty.

    Returns:
        For each task a row for each model; then those of their mean, where all metrics are better
        the same way and of one unit.

    Raises:
        MissingInputError: if no run of a task has a label of `against`.
        DataError: if runs of a task were measured on different rows.
    """
    tasks: dict[str, list[SeededRun]] = {}
    for run in runs:
        tasks.setdefault(run.task, []).append(run)
    default = DENSE if all(DENSE in run.answers for run in runs) else evaluate.TEACHER
    references = list(against) or [default]
    _check(tasks, references)
    rows: list[Row] = []
    by_task: list[dict[str, tuple[Row, dict[str, Resampled]]]] = []
    for number, (task, members) in enumerate(tasks.items()):
        labels = dict.fromkeys(label for run in members for label in run.labels)
        found = {label: _over_seeds(task, label, members, references, number) for label in labels}
        rows += [row for row, _ in found.values()]
        by_task.append(found)
    if len({(row.higher_is_better, row.in_hundredths) for row in rows}) == 1 < len(by_task):
        rows += _over_tasks(by_task)
    return rows


def to_markdown(rows: Sequence[Row]) -> str:
    """Write the rows as a Markdown table, and below it units and what its intervals are."""
    references = list(dict.fromkeys(name for row in rows for name in row.differences))
    has_before = any(row.before is not None for row in rows)
    quality = ["before", "after"] if has_before else ["quality"]
    head = ["task", "model", "seeds", "FFN FLOPs", *quality, "retention"]
    for name in references:
        head += [f"minus {name} (95 %)", "bootstrap", "t over seeds"]
    table = []
    for row in rows:
        spread = "" if row.spread is None else f" ± {_scaled(row.spread, row)}"
        cells = [
            row.task,
            row.label,
            str(row.num_seeds),
            "" if row.flops_ratio is None else f"× {row.flops_ratio:.3f}",
            *([_scaled(row.before, row)] if has_before else []),
            f"{_scaled(row.quality, row)}{spread}",
            _retention(row),
        ]
        for name in references:
            cells += _told(row, name)
        table.append(cells)
    lines = markdown_table(head, table)
    return "\n".join([*lines, *(f"\n{note}" for note in _notes(rows))]) + "\n"


def to_plain(row: Row) -> dict[str, Any]:
    """Give a row as what JSON can hold."""
    plain: dict[str, Any] = finite(asdict(row))
    return plain


def _scaled(value: float | None, row: Row) -> str:
    if value is None:
        return ""
    return UNDEFINED if math.isnan(value) else f"{row.scale * value:{_DIGITS[row.in_hundredths]}}"


def _retention(row: Row) -> str:
    if row.retention is None:
        return "" if row.undefined is None else UNDEFINED
    return f"{row.retention:.3f}"


def _told(row: Row, reference: str) -> list[str]:
    """The difference with the wider interval, and both of which that is one."""
    if reference not in row.differences:
        return ["", "", ""]
    interval = row.differences[reference]
    if interval is None:
        return [UNDEFINED, "", ""]
    digits = f"+{_DIGITS[row.in_hundredths]}"

    def ends(low: float, high: float) -> str:
        return f"{row.scale * low:{digits}} to {row.scale * high:{digits}}"

    difference = f"{row.scale * interval.difference:{digits}} ({ends(interval.low, interval.high)})"
    over_seeds = "one training run" if interval.over_seeds is None else ends(*interval.over_seeds)
    return [difference, ends(*interval.bootstrap), over_seeds]


def _notes(rows: Sequence[Row]) -> list[str]:
    """What the table cannot say of its intervals."""
    found = [one for row in rows for one in row.differences.values() if one is not None]
    measured = [row for row in rows if row.task != MEAN]
    notes = []
    for in_hundredths, unit in ((True, ", in hundredths"), (False, "")):
        titles = dict.fromkeys(
            f"{row.metric} ({row.task}{'' if row.higher_is_better else '; lower is better'})"
            for row in measured
            if row.in_hundredths == in_hundredths
        )
        notes += [f"Quality: {', '.join(titles)}{unit}."] if titles else []
    if len({row.task for row in measured}) > 1 and len(measured) == len(rows):
        notes.append("These metrics have no mean: they differ in direction or unit.")
    notes += list(dict.fromkeys(f"{row.undefined}." for row in rows if row.undefined))
    if any(one.over_seeds is not None for one in found):
        notes.append(
            "Intervals: the wider one of the paired bootstrap over dev rows and seeds and of "
            "Student's t over seeds; with two or three seeds the bootstrap alone covers too little."
        )
    if any(one.over_seeds is None for one in found):
        notes.append(
            "Where one training run of each model stands behind an interval, it knows the dev rows "
            "and nothing of other seeds: a difference may be the luck of that run."
        )
    left_out = max((one.num_undefined for one in found), default=0)
    if left_out:
        notes.append(
            f"Up to {left_out} resamples on which a metric is undefined are left out of a "
            "bootstrap."
        )
    return notes


def _check(tasks: Mapping[str, Sequence[SeededRun]], references: Sequence[str]) -> None:
    for task, members in tasks.items():
        known = dict.fromkeys(label for run in members for label in run.labels)
        missing = [name for name in references if name not in known]
        if missing:
            raise MissingInputError(
                f"no run of {task} has a model called {', '.join(missing)}",
                remedy=f"choose from {', '.join(known)}",
            )
        first = members[0].answers[evaluate.TEACHER]
        for run in members[1:]:
            rows = run.answers[evaluate.TEACHER]
            same = np.array_equal(rows.sample_ids, first.sample_ids)
            may_be_nan = np.issubdtype(first.labels.dtype, np.floating)
            if not (same and np.array_equal(rows.labels, first.labels, equal_nan=may_be_nan)):
                raise DataError(
                    f"{members[0].directory} and {run.directory} were measured on different dev "
                    f"rows of {task}",
                    remedy="compare runs that have `data.dev` in common",
                )


def _over_seeds(
    task: str, label: str, runs: Sequence[SeededRun], references: Sequence[str], number: int
) -> tuple[Row, dict[str, Resampled]]:
    mine = [run for run in runs if label in run.answers]
    metric = mine[0].metric
    qualities = [run.qualities[label] for run in mine]
    before = [
        run.qualities[f"{label}/{evaluate.BEFORE}"]
        for run in mine
        if f"{label}/{evaluate.BEFORE}" in run.answers
    ]
    is_teacher = label == evaluate.TEACHER
    teachers = [run.qualities[evaluate.TEACHER] for run in mine]
    differences: dict[str, Resampled] = {}
    for name in references:
        paired = [run for run in mine if name in run.answers and name != label]
        if paired:
            ours, theirs = ([run.said(model) for run in paired] for model in (label, name))
            differences[name] = (
                resample_mean_differences(ours, theirs, seed=number)
                if metric in MEASURES
                else resample_differences(
                    metric,
                    paired[0].answers[label].labels,
                    ours,
                    theirs,
                    mine[0].space,
                    seed=number,
                )
            )
    row = Row(
        task=task,
        label=label,
        num_seeds=len(mine),
        flops_ratio=mine[0].flops_ratios.get(label),
        before=fmean(before) if before else None,
        metric=mine[0].title,
        quality=fmean(qualities),
        spread=stdev(qualities) if len(qualities) > 1 else None,
        retention=None
        if is_teacher or metric in MEASURES
        else _mean_of_all(
            ratio(own, whole, higher_is_better=mine[0].higher_is_better)
            for own, whole in zip(qualities, teachers, strict=True)
        ),
        differences={name: found.interval() for name, found in differences.items()},
        undefined=next((why for why in (run.undefined(label) for run in mine) if why), None),
        higher_is_better=mine[0].higher_is_better,
        in_hundredths=mine[0].in_hundredths,
    )
    return row, differences


def _mean_of_all(values: Iterable[float | None]) -> float | None:
    """The mean; None where one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if len(known) == len(found) else None


def _over_tasks(by_task: Sequence[Mapping[str, tuple[Row, dict[str, Resampled]]]]) -> list[Row]:
    """Average the models that every task has; the rows of each task are drawn by themselves."""
    rows = []
    for label in by_task[0]:
        if not all(label in found for found in by_task):
            continue
        members = [found[label] for found in by_task]
        own = [row for row, _ in members]
        shared = [name for name in members[0][1] if all(name in other for _, other in members)]
        rows.append(
            Row(
                task=MEAN,
                label=label,
                num_seeds=min(row.num_seeds for row in own),
                flops_ratio=own[0].flops_ratio,
                before=_mean_of_all(row.before for row in own),
                metric=MEAN,
                quality=fmean(row.quality for row in own),
                spread=None,
                retention=_mean_of_all(row.retention for row in own),
                differences={
                    name: mean_over_tasks([other[name] for _, other in members]).interval()
                    for name in shared
                },
                undefined=next((row.undefined for row in own if row.undefined), None),
                higher_is_better=own[0].higher_is_better,
                in_hundredths=own[0].in_hundredths,
            )
        )
    return rows
