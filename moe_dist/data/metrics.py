"""Task metrics, and the paired bootstrap that compares two models on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_dist.errors import DataError

Array = NDArray[np.float64] | NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """The difference of two models on one metric, a minus b.

    Attributes:
        difference: on the examples as they are.
        low: lower end of the bootstrap interval.
        high: upper end of the bootstrap interval.
        p_value: two-sided, for "no difference".
        confidence: the interval's coverage, 0.95 unless told.
    """

    difference: float
    low: float
    high: float
    p_value: float
    confidence: float = 0.95


def accuracy(labels: Array, predictions: Array) -> float:
    """Share of predictions that are right.

    Args:
        labels: class ids (N,).
        predictions: class ids (N,).

    Returns:
        A value in [0, 1].
    """
    return float(np.mean(labels == predictions))


def f1(labels: Array, predictions: Array) -> float:
    """F1 of class 1 where the classes are 0 and 1, else the mean F1 over the classes.

    Args:
        labels: class ids (N,).
        predictions: class ids (N,).

    Returns:
        A value in [0, 1]; 0 for a class that neither occurs nor is predicted.
    """
    counts = _confusion(labels, predictions)
    hits = np.diag(counts)
    occurrences = counts.sum(0) + counts.sum(1)
    if len(counts) <= 2:
        return float(2 * hits[1] / occurrences[1]) if occurrences[1] else 0.0
    present = occurrences > 0
    return float(np.mean(2 * hits[present] / occurrences[present]))


def matthews(labels: Array, predictions: Array) -> float:
    """Matthews correlation, for any number of classes.

    Args:
        labels: class ids (N,).
        predictions: class ids (N,).

    Returns:
        A value in [-1, 1]; 0 where it is undefined.
    """
    counts = _confusion(labels, predictions).astype(np.float64)
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = np.trace(counts) * total - true @ predicted
    spread = np.sqrt(total**2 - true @ true) * np.sqrt(total**2 - predicted @ predicted)
    return float(covariance / spread) if spread > 0 else 0.0


def pearson(labels: Array, predictions: Array) -> float:
    """Pearson correlation.

    Args:
        labels: values (N,).
        predictions: values (N,).

    Returns:
        A value in [-1, 1]; 0 where one side is constant.
    """
    a = np.asarray(labels, np.float64) - np.mean(labels)
    b = np.asarray(predictions, np.float64) - np.mean(predictions)
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip((a @ b) / spread, -1.0, 1.0)) if spread > 0 else 0.0


def spearman(labels: Array, predictions: Array) -> float:
    """Spearman rank correlation; ties share their mean rank.

    Args:
        labels: values (N,).
        predictions: values (N,).

    Returns:
        A value in [-1, 1]; 0 where one side is constant.
    """
    from scipy.stats import rankdata

    return pearson(rankdata(labels), rankdata(predictions))


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}

_ON_CLASSES = ("accuracy", "f1", "matthews")


def compute_metrics(
    names: Sequence[str], predictions: ArrayLike, labels: ArrayLike
) -> dict[str, float]:
    """Compute metrics of a model's predictions.

    Args:
        names: names out of METRICS.
        predictions: class ids or values (N,), or the head's logits (N, C), of which the class
            metrics take the argmax and the correlations the only column.
        labels: class ids or values (N,).

    Returns:
        Metric name to value, in the order of `names`.

    Raises:
        DataError: for an unknown metric, different lengths, no examples, or non-finite values.
    """
    return {name: METRICS[name](*_checked(name, predictions, labels)) for name in _known(names)}


@dataclass(frozen=True)
class Resampled:
    """Bootstrap samples of a difference.

    Attributes:
        observed: the difference on the examples as they are.
        samples: on resampled ones (R,).
    """

    observed: float
    samples: NDArray[np.float64]

    def interval(self, confidence: float = 0.95) -> Interval:
        """Turn the samples into a percentile interval.

        Args:
            confidence: its coverage.

        Returns:
            Difference, interval and two-sided p-value.
        """
        tail = (1.0 - confidence) / 2.0
        low, high = np.quantile(self.samples, [tail, 1.0 - tail])
        # One is added to both counts, so that a finite number of samples never claims p = 0.
        below = (np.sum(self.samples <= 0) + 1) / (len(self.samples) + 1)
        above = (np.sum(self.samples >= 0) + 1) / (len(self.samples) + 1)
        return Interval(
            difference=self.observed,
            low=float(low),
            high=float(high),
            p_value=float(min(1.0, 2 * min(below, above))),
            confidence=confidence,
        )


@dataclass(frozen=True)
class Pairing:
    """Two models' answers to the same examples.

    Attributes:
        metric: a name out of METRICS.
        labels: class ids or values (N,).
        predictions_a: as in `compute_metrics`.
        predictions_b: as in `compute_metrics`, of the same examples in the same order.
    """

    metric: str
    labels: ArrayLike
    predictions_a: ArrayLike
    predictions_b: ArrayLike


def paired_bootstrap(
    metric: str,
    labels: ArrayLike,
    predictions_a: ArrayLike,
    predictions_b: ArrayLike,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of metric(a) - metric(b), examples resampled in pairs.

    Args:
        metric: a name out of METRICS.
        labels: class ids or values (N,).
        predictions_a: as in `compute_metrics`.
        predictions_b: as in `compute_metrics`, of the same examples in the same order.
        num_resamples: bootstrap samples to draw.
        seed: fixes the samples.
        confidence: the interval's coverage.

    Returns:
        Difference, interval and two-sided p-value.

    Raises:
        DataError: for an unknown metric, different lengths, no examples, or non-finite values.
    """
    return seeded_bootstrap(
        metric,
        labels,
        [predictions_a],
        [predictions_b],
        num_resamples=num_resamples,
        seed=seed,
        confidence=confidence,
    )


def seeded_bootstrap(
    metric: str,
    labels: ArrayLike,
    runs_a: Sequence[ArrayLike],
    runs_b: Sequence[ArrayLike],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of the mean of metric(a) - metric(b) over seeds; examples and seeds resampled.

    Args:
        metric: a name out of METRICS.
        labels: class ids or values (N,).
        runs_a: the answers of a, trained with each seed; as in `compute_metrics`.
        runs_b: those of b with the same seeds, for the same examples in the same order.
        num_resamples: bootstrap samples to draw.
        seed: fixes the samples.
        confidence: the interval's coverage.

    Returns:
        Difference, percentile interval and two-sided p-value.

    Raises:
        DataError: as `resample_differences`.
    """
    return resample_differences(
        metric, labels, runs_a, runs_b, num_resamples=num_resamples, seed=seed
    ).interval(confidence)


def mean_bootstrap(
    pairings: Sequence[Pairing],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the mean over tasks of metric(a) - metric(b).

    Args:
        pairings: of each task; the examples of each are resampled on their own.
        num_resamples: bootstrap samples to draw.
        seed: fixes the samples.
        confidence: the interval's coverage.

    Returns:
        Difference, interval and two-sided p-value.

    Raises:
        DataError: as `resample_differences`.
    """
    drawn = [
        resample_differences(
            one.metric,
            one.labels,
            [one.predictions_a],
            [one.predictions_b],
            num_resamples=num_resamples,
            seed=seed + number,
        )
        for number, one in enumerate(pairings)
    ]
    return mean_over_tasks(drawn).interval(confidence)


def mean_over_tasks(parts: Sequence[Resampled]) -> Resampled:
    """Average what was found on several tasks, each resampled on its own.

    Args:
        parts: of each task, with as many samples as the others.

    Returns:
        The mean difference and its samples.
    """
    return Resampled(
        float(np.mean([part.observed for part in parts])),
        np.mean([part.samples for part in parts], axis=0),
    )


def resample_differences(
    metric: str,
    labels: ArrayLike,
    predictions_a: Sequence[ArrayLike],
    predictions_b: Sequence[ArrayLike],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Resampled:
    """Draw bootstrap samples of the mean difference of two models that were trained with S seeds.

    Each draws S seeds and N examples with replacement; both models answer the same ones. Which
    seeds are drawn depends on S alone, so that tasks that one model learned together stay together
    in `mean_over_tasks`.

    Args:
        metric: a name out of METRICS.
        labels: class ids or values (N,).
        predictions_a: S entries as in `compute_metrics`, one for each seed.
        predictions_b: S entries of the same seeds and examples.
        num_resamples: R, bootstrap samples to draw.
        seed: fixes the examples.

    Returns:
        The mean over the seeds of metric(a) - metric(b), and R samples of it.

    Raises:
        DataError: for an unknown metric, different lengths, no seeds or examples, or non-finite
            values.
    """
    _known([metric])
    if not predictions_a or len(predictions_a) != len(predictions_b):
        raise DataError(
            f"{metric}: {len(predictions_a)} and {len(predictions_b)} seeds cannot be compared",
            remedy="give both models' predictions for each seed",
        )
    score = METRICS[metric]
    pairs = [
        (_checked(metric, first, labels)[1], _checked(metric, second, labels)[1])
        for first, second in zip(predictions_a, predictions_b, strict=True)
    ]
    true = np.asarray(labels)

    def difference(number: int, chosen: NDArray[np.int64]) -> float:
        first, second = pairs[number]
        return score(true[chosen], first[chosen]) - score(true[chosen], second[chosen])

    return _resample(difference, len(pairs), len(true), num_resamples, seed)


def resample_mean_differences(
    errors_a: Sequence[ArrayLike],
    errors_b: Sequence[ArrayLike],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Resampled:
    """Draw bootstrap samples of the difference of two models' mean errors, as above.

    Args:
        errors_a: S arrays (N,), an error for each example, one array for each seed.
        errors_b: S arrays of the same seeds and examples.
        num_resamples: R, bootstrap samples to draw.
        seed: fixes the examples.

    Returns:
        The mean over the seeds of mean(a) - mean(b), and R samples of it.

    Raises:
        DataError: for different lengths, no seeds or examples, or non-finite values.
    """
    gaps = []
    for first, second in zip(errors_a, errors_b, strict=False):
        one, other = np.asarray(first, float), np.asarray(second, float)
        if one.ndim != 1 or one.shape != other.shape or not one.size:
            raise DataError(
                f"errors {one.shape} and {other.shape} do not belong together",
                remedy="pass both models' errors on the same examples",
            )
        gaps.append(one - other)
    if not gaps or len(errors_a) != len(errors_b) or len({len(gap) for gap in gaps}) > 1:
        raise DataError(
            f"errors of {len(errors_a)} and {len(errors_b)} seeds cannot be compared",
            remedy="give both models' errors on the same examples for each seed",
        )
    if not all(np.isfinite(gap).all() for gap in gaps):
        raise DataError(
            "errors hold NaN or infinity",
            remedy="look at the models that made them; their training may have diverged",
        )
    return _resample(
        lambda number, chosen: float(gaps[number][chosen].mean()),
        len(gaps),
        len(gaps[0]),
        num_resamples,
        seed,
    )


def _resample(
    difference: Callable[[int, NDArray[np.int64]], float],
    num_seeds: int,
    num_examples: int,
    num_resamples: int,
    seed: int,
) -> Resampled:
    """Draw seeds and examples together; `difference` is that of one seed on chosen examples."""
    rng = np.random.default_rng(seed)
    drawn_RS = np.random.default_rng(0).integers(0, num_seeds, (num_resamples, num_seeds))
    samples = np.empty(num_resamples)
    for i, seeds in enumerate(drawn_RS):
        chosen = rng.integers(0, num_examples, num_examples)
        samples[i] = np.mean([difference(int(k), chosen) for k in seeds])
    everything = np.arange(num_examples)
    observed = float(np.mean([difference(k, everything) for k in range(num_seeds)]))
    return Resampled(observed, samples)


def _known(names: Sequence[str]) -> Sequence[str]:
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise DataError(
            f"unknown metric: {', '.join(unknown)}", remedy=f"choose from {', '.join(METRICS)}"
        )
    return names


def _checked(name: str, predictions: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
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
    if not (np.isfinite(true).all() and np.isfinite(raw).all()):
        raise DataError(
            f"{name}: predictions or labels hold NaN or infinity",
            remedy="look at the model that made them; its training may have diverged",
        )
    return true, guess


def _confusion(labels: Array, predictions: Array) -> NDArray[np.int64]:
    size = max(2, int(labels.max()) + 1, int(predictions.max()) + 1)
    flat = labels.astype(np.int64) * size + predictions.astype(np.int64)
    return np.bincount(flat, minlength=size * size).reshape(size, size)
