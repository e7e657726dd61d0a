"""What a metric makes of predictions: class ids or values (N,), against labels of the same kind.

Own code, since intervals compute these on thousands of resamples and scikit-learn and SciPy check
their input anew each time; the tests hold every case against theirs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64] | NDArray[np.int64]
# Values that differ by less than rounding are equal; SciPy warns of such from here on.
_NEAR_CONSTANT = 1e-13


def accuracy(labels: Array, predictions: Array) -> float:
    """Share of predictions that are right."""
    return float(np.mean(labels == predictions))


def f1(labels: Array, predictions: Array, num_classes: int, positive: int) -> float:
    """F1 of the positive class of two, or the mean F1 over all classes of the task.

    Args:
        labels: class ids (N,).
        predictions: class ids (N,).
        num_classes: of the task; it alone decides which of the two it is.
        positive: id of the positive class of two.

    Returns:
        A value in [0, 1]. Among more than two classes one that does not occur counts as 0, whether
        it is predicted or not (scikit-learn's `zero_division=0`); of two, NaN where the positive
        one does not occur.
    """
    counts = _confusion(labels, predictions, num_classes)
    hits = np.diag(counts)
    sums = counts.sum(0) + counts.sum(1)
    if num_classes == 2:
        occurs = counts[positive].sum() > 0
        return float(2 * hits[positive] / sums[positive]) if occurs else math.nan
    return float(np.mean(2 * hits / np.maximum(sums, 1)))


def matthews(labels: Array, predictions: Array, num_classes: int) -> float:
    """Matthews correlation in [-1, 1], for any number of classes; NaN where a side is constant."""
    counts = _confusion(labels, predictions, num_classes).astype(np.float64)
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = np.trace(counts) * total - true @ predicted
    spread = np.sqrt(total**2 - true @ true) * np.sqrt(total**2 - predicted @ predicted)
    return float(covariance / spread) if spread > 0 else math.nan


def pearson(labels: Array, predictions: Array) -> float:
    """Pearson correlation; NaN where one side is constant."""
    one, other = _deviations(labels), _deviations(predictions)
    return math.nan if one is None or other is None else float(np.clip(one @ other, -1.0, 1.0))


def spearman(labels: Array, predictions: Array) -> float:
    """Spearman rank correlation, ties sharing their mean rank; NaN where one side is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(labels), rankdata(predictions))


def is_constant(values: Array) -> bool:
    """Whether values (N,) are all the same, but for rounding."""
    return _deviations(values) is None


def _confusion(labels: Array, predictions: Array, num_classes: int) -> NDArray[np.int64]:
    flat = labels.astype(np.int64) * num_classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def _deviations(values: Array) -> NDArray[np.float64] | None:
    """Centre values and scale them to length 1; None where they are constant."""
    whole = np.asarray(values, np.float64)
    # Scaled first, so that squares of large floats stay finite, by a power of two, which is exact.
    scaled = np.ldexp(whole, -np.frexp(np.abs(whole).max())[1])
    centred = scaled - scaled.mean()
    length = float(np.sqrt(centred @ centred))
    if np.ptp(whole) == 0 or length <= _NEAR_CONSTANT * np.sqrt(len(whole)) * abs(scaled.mean()):
        return None
    return centred / length
