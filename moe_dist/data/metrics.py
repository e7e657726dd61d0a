"""Task metrics. One that is undefined on the rows at hand is NaN, and a sentence says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moe_dist.data import figures, scores
from moe_dist.data.scores import Array
from moe_dist.errors import DataError


@dataclass(frozen=True)
class LabelSpace:
    """What metrics know of a task, whatever labels occur in the rows at hand.

    Attributes:
        num_classes: of the task; None for regression.
        positive: id of the class that F1 of two classes is about.
        names: of the classes, in the order of their ids; may be missing.
        columns: names of the figures that an answer consists of, where it is no prediction.
    """

    num_classes: int | None
    positive: int = 1
    names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def called(self, number: int) -> str:
        """Name a class."""
        return self.names[number] if self.names else str(number)


Compute = Callable[[Array, Any, LabelSpace], float]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as recipes say it.
        compute: its value for labels (N,) and answers: (N,) predictions, or the figures that
            `columns` names, (N,) of one and (N, K) of several.
        title: what people call it; its name if empty.
        higher_is_better: which way is better.
        is_fraction: it lies in [-1, 1], and people may read it in hundredths.
        on_classes: labels and predictions are ids of classes.
        columns: the figures that it reads in place of predictions.
        reads_labels: False where the figures hold the comparison with what is right already.
        why_undefined: says of figures for which it is NaN why it is.
    """

    name: str
    compute: Compute
    title: str = ""
    higher_is_better: bool = True
    is_fraction: bool = True
    on_classes: bool = False
    columns: tuple[str, ...] = ()
    reads_labels: bool = True
    why_undefined: Callable[[Any], str] | None = None


def _f1(labels: Array, predictions: Array, space: LabelSpace) -> float:
    assert space.num_classes is not None, "checked with the answers"
    return scores.f1(labels, predictions, space.num_classes, space.positive)


def _matthews(labels: Array, predictions: Array, space: LabelSpace) -> float:
    assert space.num_classes is not None, "checked with the answers"
    return scores.matthews(labels, predictions, space.num_classes)


def _of_values(compute: Callable[[Array, Array], float]) -> Compute:
    """Let a formula be one of those that are told the task's classes, which it does not need."""
    return lambda labels, answers, space: compute(labels, answers)


def _of_figures(
    name: str, title: str, compute: Callable[[Any], float], *columns: str, lower: bool = False
) -> Metric:
    """Make the row of a metric of figures alone; the last column is what a rate is for each of."""
    why = partial(figures.why_no_rate, counted=columns[-1]) if lower else None
    return Metric(
        name,
        lambda labels, answers, space: compute(answers),
        title,
        higher_is_better=not lower,
        is_fraction=not lower,
        columns=columns,
        reads_labels=False,
        why_undefined=why,
    )


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _of_values(scores.accuracy), on_classes=True),
        Metric("f1", _f1, on_classes=True),
        Metric("matthews", _matthews, on_classes=True),
        Metric("pearson", _of_values(scores.pearson)),
        Metric("spearman", _of_values(scores.spearman)),
        _of_figures(
            "perplexity", "perplexity", figures.mean_exponential, "nll", "tokens", lower=True
        ),
        _of_figures(
            "word_perplexity",
            "perplexity by word",
            figures.mean_exponential,
            "nll",
            "words",
            lower=True,
        ),
        _of_figures(
            "bits_per_byte", "bits per byte", figures.bits_for_each, "nll", "bytes", lower=True
        ),
        Metric(
            "cosine_spearman",
            _of_values(scores.spearman),
            "Spearman of cosines",
            columns=("cosine",),
        ),
        Metric(
            "cosine_pearson", _of_values(scores.pearson), "Pearson of cosines", columns=("cosine",)
        ),
        _of_figures("recall_at_1", "recall@1", figures.recall_at_1, "rank"),
        _of_figures("recall_at_10", "recall@10", figures.recall_at_10, "rank"),
        _of_figures("mrr", "MRR", figures.mean_reciprocal_rank, "rank"),
        _of_figures("exact_match", "exact match", figures.mean, "exact"),
        _of_figures("answer_f1", "answer F1", figures.mean, "f1"),
        _of_figures("rouge1", "ROUGE-1", figures.mean, "rouge1"),
        _of_figures("rouge2", "ROUGE-2", figures.mean, "rouge2"),
        _of_figures("rougeL", "ROUGE-L", figures.mean, "rougeL"),
        _of_figures("rougeLsum", "ROUGE-Lsum", figures.mean, "rougeLsum"),
        _of_figures("chrf", "chrF", figures.chrf, *figures.CHRF_COLUMNS),
    )
}


def metric_title(name: str, space: LabelSpace) -> str:
    """Name a metric for people: `f1 of ok`, or `macro f1` for more than two classes."""
    if name != "f1" or space.num_classes is None:
        return METRICS[name].title or name
    return f"f1 of {space.called(space.positive)}" if space.num_classes == 2 else "macro f1"


def compute_metrics(
    names: Sequence[str], predictions: ArrayLike, labels: ArrayLike, space: LabelSpace
) -> dict[str, float]:
    """Compute metrics of a model's predictions.

    Args:
        names: names out of METRICS.
        predictions: class ids or values (N,), or the head's logits (N, C), of which the class
            metrics take the argmax and the correlations the only column; or the figures that
            `space.columns` names, (N, C).
        labels: class ids or values (N,).
        space: the task's classes.

    Returns:
        Metric name to value, in the order of `names`; NaN where one is undefined, see
        `explain_undefined`.

    Raises:
        DataError: for an unknown metric, different lengths, no examples, classes or figures that
            the task has not, or non-finite values.
    """
    return {
        name: METRICS[name].compute(*check_answers(name, predictions, labels, space), space)
        for name in check_names(names)
    }


def explain_undefined(
    name: str, predictions: ArrayLike, labels: ArrayLike, space: LabelSpace
) -> str | None:
    """Say why a metric is undefined, in a clause; None where it has a value.

    Takes predictions and raises as `compute_metrics` does.
    """
    true, guess = check_answers(name, predictions, labels, space)
    metric = METRICS[name]
    if not math.isnan(metric.compute(true, guess, space)):
        return None
    if metric.why_undefined is not None:
        return metric.why_undefined(guess)
    said = metric.columns[0] if metric.columns else "prediction"
    return undefined_by_labels(name, true, space) or _constant(f"{said}s", guess, space)


def undefined_by_labels(name: str, labels: ArrayLike, space: LabelSpace) -> str | None:
    """Say why a metric is undefined on such labels (N,), whatever a model predicts.

    A clause such as `all 40 labels are 'good'`; None where it depends on the model.
    """
    true = np.asarray(labels)
    if name == "f1" and space.num_classes == 2:
        if not np.any(true == space.positive):
            return f"none of the {len(true)} labels is {space.called(space.positive)!r}"
        return None
    depends_on_model = name in ("accuracy", "f1") or not METRICS[name].reads_labels
    return None if depends_on_model else _constant("labels", true, space)


def missing_classes(name: str, labels: ArrayLike, space: LabelSpace) -> list[str]:
    """Name the classes that the mean F1 counts as 0, since they do not occur."""
    if name != "f1" or space.num_classes in (None, 2):
        return []
    counts = np.bincount(np.asarray(labels), minlength=space.num_classes)
    return [space.called(number) for number in np.flatnonzero(counts == 0).tolist()]


def check_names(names: Sequence[str]) -> Sequence[str]:
    """Give metric names back; a DataError names those that are not known."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise DataError(
            f"unknown metric: {', '.join(unknown)}", remedy=f"choose from {', '.join(METRICS)}"
        )
    return names


def check_answers(
    name: str, predictions: ArrayLike, labels: ArrayLike, space: LabelSpace
) -> tuple[Array, Array]:
    """See that predictions and labels belong together and to the task.

    Args:
        name: the metric.
        predictions: as in `compute_metrics`.
        labels: class ids or values (N,).
        space: the task's classes.

    Returns:
        Labels (N,) and predictions (N,), of the metric's kind; of a metric of several figures
        these, (N, K).

    Raises:
        DataError: as `compute_metrics`.
    """
    metric = METRICS[name]
    true, raw = np.asarray(labels), np.asarray(predictions)
    if metric.columns or space.columns:
        raw = _columns(metric, raw, space)
    guess = raw
    if raw.ndim == 2 and raw.shape[1] and len(metric.columns) < 2:
        guess = raw.argmax(1) if metric.on_classes else raw[:, 0]
    width = guess.shape[1:] if len(metric.columns) > 1 else ()
    if true.ndim != 1 or guess.shape != (*true.shape, *width):
        raise DataError(
            f"{name}: predictions {raw.shape} and labels {true.shape} do not belong together",
            remedy="pass one prediction for each label",
        )
    if not true.size:
        raise DataError(f"{name}: there are no examples", remedy="give a dev set with rows")
    wrong = ~np.isfinite(raw).reshape(len(raw), -1).all(1)
    if wrong.any() or (metric.reads_labels and not np.isfinite(true).all()):
        what = f"{wrong.sum()} of {len(raw)} predictions are" if wrong.any() else "labels are"
        raise DataError(
            f"{name}: {what} NaN or infinite",
            remedy="look at the model that made them; its training may have diverged",
        )
    if metric.on_classes:
        _check_classes(name, true, guess, space)
    return true, guess


def _columns(metric: Metric, raw: Array, space: LabelSpace) -> Array:
    """Take out the figures that a metric reads, (N, K)."""
    missing = [name for name in metric.columns if name not in space.columns]
    if missing or not metric.columns:
        suitable = [
            one.name
            for one in METRICS.values()
            if one.columns and set(one.columns) <= set(space.columns)
        ]
        needs = f"reads {', '.join(missing)}" if missing else "is for predictions"
        has = f"has {', '.join(space.columns)}" if space.columns else "has predictions"
        raise DataError(
            f"{metric.name} {needs}, and this task {has}",
            remedy=f"use {' or '.join(suitable)}" if suitable else "measure the task it is for",
        )
    if raw.ndim != 2 or raw.shape[1] != len(space.columns):
        raise DataError(
            f"{metric.name}: figures {raw.shape} are not those of {', '.join(space.columns)}",
            remedy=f"pass an array (N, {len(space.columns)})",
        )
    # Sums of thousands of figures need more digits than a float32 has.
    return raw[:, [space.columns.index(name) for name in metric.columns]].astype(np.float64)


def _check_classes(name: str, labels: Array, predictions: Array, space: LabelSpace) -> None:
    if space.num_classes is None:
        raise DataError(f"{name} is for classes, and this is a regression", remedy="use pearson")
    for what, ids in (("label", labels), ("prediction", predictions)):
        strange = (ids < 0) | (ids >= space.num_classes) | (ids != np.floor(ids))
        if strange.any():
            raise DataError(
                f"{name}: {what} {ids[strange][0]} is none of the task's {space.num_classes} "
                "classes",
                remedy="measure a model on the task that it was made for",
            )


def _constant(what: str, values: Array, space: LabelSpace) -> str | None:
    if space.num_classes is None:
        if not scores.is_constant(values):
            return None
        return f"all {len(values)} {what} are equal ({float(values[0]):.4g})"
    if np.ptp(values) > 0:
        return None
    return f"all {len(values)} {what} are {space.called(int(values[0]))!r}"
