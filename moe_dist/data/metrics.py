"""Task metrics. One that is undefined on the rows at hand is NaN, and a sentence says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_dist.errors import DataError
from moe_dist.tasks.classification import Classification

Array = NDArray[np.float64] | NDArray[np.int64]
# Values that differ by less than rounding are equal; SciPy warns of such from here on.
_NEAR_CONSTANT = 1e-13


@dataclass(frozen=True)
class LabelSpace:
    """What metrics know of a task, whatever labels occur in the rows at hand.

    Attributes:
        num_classes: of the task; None for regression.
        positive: id of the class that F1 of two classes is about.
        names: of the classes, in the order of their ids; may be missing.
        columns: names of the figures that answers consist of; none for logits.
    """

    num_classes: int | None
    positive: int = 1
    names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def called(self, number: int) -> str:
        """Name a class."""
        return self.names[number] if self.names else str(number)


def accuracy(labels: Array, predictions: Array, space: LabelSpace) -> float:
    """Share of predictions that are right."""
    return float(np.mean(labels == predictions))


def f1(labels: Array, predictions: Array, space: LabelSpace) -> float:
    """F1 of the positive class of two, or the mean F1 over all classes of the task.

    Args:
        labels: class ids (N,).
        predictions: class ids (N,).
        space: the task's classes; their number alone decides which of the two it is.

    Returns:
        A value in [0, 1]. Among more than two classes one that does not occur counts as 0, whether
        it is predicted or not (scikit-learn's `zero_division=0`); of two, NaN where the positive
        one does not occur.
    """
    counts = _confusion(labels, predictions, space)
    hits = np.diag(counts)
    sums = counts.sum(0) + counts.sum(1)
    if space.num_classes == 2:
        positive = space.positive
        occurs = counts[positive].sum() > 0
        return float(2 * hits[positive] / sums[positive]) if occurs else math.nan
    return float(np.mean(2 * hits / np.maximum(sums, 1)))


def matthews(labels: Array, predictions: Array, space: LabelSpace) -> float:
    """Matthews correlation in [-1, 1], for any number of classes; NaN where a side is constant."""
    counts = _confusion(labels, predictions, space).astype(np.float64)
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = np.trace(counts) * total - true @ predicted
    spread = np.sqrt(total**2 - true @ true) * np.sqrt(total**2 - predicted @ predicted)
    return float(covariance / spread) if spread > 0 else math.nan


def pearson(labels: Array, predictions: Array, space: LabelSpace) -> float:
    """Pearson correlation; NaN where one side is constant."""
    one, other = _deviations(labels), _deviations(predictions)
    return math.nan if one is None or other is None else float(np.clip(one @ other, -1.0, 1.0))


def spearman(labels: Array, predictions: Array, space: LabelSpace) -> float:
    """Spearman rank correlation, ties sharing their mean rank; NaN where one side is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(labels), rankdata(predictions), space)


METRICS: dict[str, Callable[[Array, Array, LabelSpace], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
_ON_CLASSES = Classification.metrics


def metric_title(name: str, space: LabelSpace) -> str:
    """Name a metric for people: `f1 of ok`, or `macro f1` for more than two classes."""
    if name != "f1" or space.num_classes is None:
        return name
    return f"f1 of {space.called(space.positive)}" if space.num_classes == 2 else "macro f1"


def compute_metrics(
    names: Sequence[str], predictions: ArrayLike, labels: ArrayLike, space: LabelSpace
) -> dict[str, float]:
    """Compute metrics of a model's predictions.

    Args:
        names: names out of METRICS.
        predictions: class ids or values (N,), or the head's logits (N, C), of which the class
            metrics take the argmax and the correlations the only column.
        labels: class ids or values (N,).
        space: the task's classes.

    Returns:
        Metric name to value, in the order of `names`; NaN where one is undefined, see
        `explain_undefined`.

    Raises:
        DataError: for an unknown metric, different lengths, no examples, classes that the task
            has not, or non-finite values.
    """
    return {
        name: METRICS[name](*check_answers(name, predictions, labels, space), space)
        for name in check_names(names)
    }


def explain_undefined(
    name: str, predictions: ArrayLike, labels: ArrayLike, space: LabelSpace
) -> str | None:
    """Say why a metric is undefined, in a clause; None where it has a value.

    Takes predictions and raises as `compute_metrics` does.
    """
    true, guess = check_answers(name, predictions, labels, space)
    if not math.isnan(METRICS[name](true, guess, space)):
        return None
    return undefined_by_labels(name, true, space) or _constant("predictions", guess, space)


def undefined_by_labels(name: str, labels: ArrayLike, space: LabelSpace) -> str | None:
    """Say why a metric is undefined on such labels (N,), whatever a model predicts.

    A clause such as `all 40 labels are 'good'`; None where it depends on the model.
    """
    true = np.asarray(labels)
    if name == "f1" and space.num_classes == 2:
        if not np.any(true == space.positive):
            return f"none of the {len(true)} labels is {space.called(space.positive)!r}"
        return None
    return None if name in ("accuracy", "f1") else _constant("labels", true, space)


def missing_classes(name: str, labels: ArrayLike, space: LabelSpace) -> list[str]:
    """Name the classes that the mean F1 counts as 0, since they do not occur."""
    if name != "f1" or space.num_classes in (None, 2):
        return []
    counts = np.bincount(np.asarray(labels), minlength=space.num_classes)
    return [space.called(number) for number in np.flatnonzero(counts == 0).tolist()]


def ratio(value: float | None, whole: float | None) -> float | None:
    """Give the part that a student keeps of its teacher's metric; None if undefined.

    So it is where the teacher's is not above 0: a part of "no better than chance", or worse, is no
    success however near to 1 it is.
    """
    if value is None or whole is None or why_no_ratio(value, whole) is not None:
        return None
    return value / whole


def why_no_ratio(value: float | None, whole: float | None, metric: str = "metric") -> str | None:
    """Say in a clause why there is no retention; None where it is defined."""
    if whole is None or math.isnan(whole):
        return f"the teacher's {metric} is undefined"
    if value is None or math.isnan(value):
        return f"the student's {metric} is undefined"
    if whole <= 0:
        return (
            f"the teacher's {metric} is {whole:.4g}, and a part of what is not above 0 says nothing"
        )
    return None


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
        Labels and predictions (N,), of the metric's kind.

    Raises:
        DataError: as `compute_metrics`.
    """
    true, raw = np.asarray(labels), np.asarray(predictions)
    guess = raw
    if raw.ndim == 2 and raw.size:
        guess = raw.argmax(1) if name in _ON_CLASSES else raw[:, 0]
    if true.ndim != 1 or true.shape != guess.shape:
        raise DataError(
            f"{name}: predictions {raw.shape} and labels {true.shape} do not belong together",
            remedy="pass one prediction for each label",
        )
    if not true.size:
        raise DataError(f"{name}: there are no examples", remedy="give a dev set with rows")
    wrong = ~np.isfinite(raw).reshape(len(raw), -1).all(1)
    if wrong.any() or not np.isfinite(true).all():
        what = f"{wrong.sum()} of {len(raw)} predictions are" if wrong.any() else "labels are"
        raise DataError(
            f"{name}: {what} NaN or infinite",
            remedy="look at the model that made them; its training may have diverged",
        )
    if name in _ON_CLASSES:
        _check_classes(name, true, guess, space)
    return true, guess


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


def _confusion(labels: Array, predictions: Array, space: LabelSpace) -> NDArray[np.int64]:
    assert space.num_classes is not None, "checked with the answers"
    size = space.num_classes
    flat = labels.astype(np.int64) * size + predictions.astype(np.int64)
    return np.bincount(flat, minlength=size * size).reshape(size, size)


def _deviations(values: Array) -> NDArray[np.float64] | None:
    """Centre values and scale them to length 1; None where they are constant."""
    whole = np.asarray(values, np.float64)
    largest = np.abs(whole).max()
    # Scaled first, so that squares of the largest floats stay finite.
    scaled = whole / largest if largest > 0 else whole
    centred = scaled - scaled.mean()
    length = float(np.sqrt(centred @ centred))
    if np.ptp(whole) == 0 or length <= _NEAR_CONSTANT * np.sqrt(len(whole)) * abs(scaled.mean()):
        return None
    return centred / length


def _constant(what: str, values: Array, space: LabelSpace) -> str | None:
    if space.num_classes is None:
        if _deviations(values) is not None:
            return None
        return f"all {len(values)} {what} are equal ({float(values[0]):.4g})"
    if np.ptp(values) > 0:
        return None
    return f"all {len(values)} {what} are {space.called(int(values[0]))!r}"
