"""The same students trained with several seeds, on one task or more: means and intervals.

One run tells a recipe's luck from its worth no better than one throw of a die. This takes what
`evaluate` kept of each run, resamples examples and seeds together, and sets Student's t over seeds
beside it: of the two the wider interval counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from moe_dist.data.retention import ratio
from moe_dist.errors import DataError, MissingInputError
from moe_dist.measure.bootstrap import (
    Interval,
    Resampled,
    mean_over_tasks,
    resample_differences,
    resample_mean_differences,
)

from ..stages import evaluate
from .nearness import MEASURES
from .seeded_runs import SeededRun

DENSE = "dense"
MEAN = "mean over tasks"


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
