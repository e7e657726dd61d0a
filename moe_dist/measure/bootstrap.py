"""Bootstrap and Student's t: how sure a difference of two models on the same examples is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_dist.data.metrics import METRICS, LabelSpace, check_answers, check_names
from moe_dist.errors import DataError

MIN_DEFINED = 0.5
"""Of so many resamples the metric must be defined, or there is no interval."""

NO_INTERVAL = "it is undefined on more than half of the resamples"

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """The difference of two models on one metric, a minus b.

    Attributes:
        difference: on the examples as they are.
        low: lower end of the wider one of `bootstrap` and `over_seeds`.
        high: its upper end.
        p_value: two-sided, for "no difference"; the larger one of the two ways.
        bootstrap: percentile interval, examples and seeds resampled.
        confidence: the interval's coverage, 0.95 unless told.
        num_seeds: training runs of each model; with one the interval knows nothing of others.
        over_seeds: Student's t over the seeds; None for one.
        num_undefined: resamples that are left out, since the metric is undefined on them.
    """

    difference: float
    low: float
    high: float
    p_value: float
    bootstrap: Bounds
    confidence: float = 0.95
    num_seeds: int = 1
    over_seeds: Bounds | None = None
    num_undefined: int = 0


@dataclass(frozen=True)
class Resampled:
    """Bootstrap samples of a difference.

    Attributes:
        observed: the difference on the examples as they are; NaN where a metric is undefined.
        samples: on resampled ones (R,); NaN likewise.
        by_seed: for each task the difference of each seed (S,), on the examples as they are.
    """

    observed: float
    samples: NDArray[np.float64]
    by_seed: tuple[NDArray[np.float64], ...]

    def interval(self, confidence: float = 0.95) -> Interval | None:
        """Turn the samples into an interval.

        A bootstrap of two or three seeds covers far less than it claims where seeds differ much,
        and Student's t over seeds does not see the examples: so the wider one counts. Resamples
        on which the metric is undefined are left out and counted.

        Args:
            confidence: its coverage.

        Returns:
            Difference, interval and two-sided p-value; None where the difference is undefined, or
            fewer than `MIN_DEFINED` of the resamples are defined.
        """
        defined = self.samples[~np.isnan(self.samples)]
        if np.isnan(self.observed) or len(defined) < MIN_DEFINED * len(self.samples):
            return None
        tail = (1.0 - confidence) / 2.0
        low, high = (float(end) for end in np.quantile(defined, [tail, 1.0 - tail]))
        # One is added to both counts, so that a finite number of samples never claims p = 0.
        below = (np.sum(defined <= 0) + 1) / (len(defined) + 1)
        above = (np.sum(defined >= 0) + 1) / (len(defined) + 1)
        p_value = float(min(1.0, 2 * min(below, above)))
        drawn, over_seeds = (low, high), self._over_seeds(confidence)
        if over_seeds is not None:
            p_value = max(p_value, over_seeds[1])
            low, high = max(drawn, over_seeds[0], key=lambda ends: ends[1] - ends[0])
        return Interval(
            difference=self.observed,
            low=low,
            high=high,
            p_value=p_value,
            confidence=confidence,
            num_seeds=min(map(len, self.by_seed)),
            bootstrap=drawn,
            over_seeds=None if over_seeds is None else over_seeds[0],
            num_undefined=len(self.samples) - len(defined),
        )

    def _over_seeds(self, confidence: float) -> tuple[Bounds, float] | None:
        """Student's t over seeds and its p-value; None for one seed."""
        from scipy import stats

        num_seeds = min(map(len, self.by_seed))
        if num_seeds < 2:
            return None
        if len({len(gaps) for gaps in self.by_seed}) == 1:
            errors = [stats.sem(np.mean(self.by_seed, axis=0))]
        else:
            # Which seeds belong together is not known: errors are added as if all went together.
            errors = [stats.sem(gaps) for gaps in self.by_seed]
        error = float(np.mean(errors))
        reach = float(stats.t.ppf((1.0 + confidence) / 2.0, num_seeds - 1)) * error
        distance = abs(self.observed) / error if error > 0 else (np.inf if self.observed else 0.0)
        p_value = float(2.0 * stats.t.sf(distance, num_seeds - 1))
        return (self.observed - reach, self.observed + reach), p_value


@dataclass(frozen=True)
class Pairing:
    """Two models' answers to the same examples.

    Attributes:
        metric: a name out of METRICS.
        labels: class ids or values (N,).
        predictions_a: as in `compute_metrics`.
        predictions_b: as in `compute_metrics`, of the same examples in the same order.
        space: the task's classes.
    """

    metric: str
    labels: ArrayLike
    predictions_a: ArrayLike
    predictions_b: ArrayLike
    space: LabelSpace


def paired_bootstrap(
    metric: str,
    labels: ArrayLike,
    predictions_a: ArrayLike,
    predictions_b: ArrayLike,
    space: LabelSpace,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval | None:
    """Percentile interval of metric(a) - metric(b), examples resampled in pairs.

    Args:
        metric: a name out of METRICS.
        labels: class ids or values (N,).
        predictions_a: as in `compute_metrics`.
        predictions_b: as in `compute_metrics`, of the same examples in the same order.
        space: the task's classes.
        num_resamples: bootstrap samples to draw.
        seed: fixes the samples.
        confidence: the interval's coverage.

    Returns:
        Difference, interval and two-sided p-value; None where they are undefined.

    Raises:
        DataError: for an unknown metric, different lengths, no examples, or non-finite values.
    """
    return seeded_bootstrap(
        metric,
        labels,
        [predictions_a],
        [predictions_b],
        space,
        num_resamples=num_resamples,
        seed=seed,
        confidence=confidence,
    )


def seeded_bootstrap(
    metric: str,
    labels: ArrayLike,
    runs_a: Sequence[ArrayLike],
    runs_b: Sequence[ArrayLike],
    space: LabelSpace,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval | None:
    """Interval of the mean of metric(a) - metric(b) over seeds, see `resample_differences`.

    `runs_a` and `runs_b` hold the answers for each seed; None where the metric is undefined.
    """
    return resample_differences(
        metric, labels, runs_a, runs_b, space, num_resamples=num_resamples, seed=seed
    ).interval(confidence)


def mean_bootstrap(
    pairings: Sequence[Pairing],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval | None:
    """Percentile interval of the mean over tasks of metric(a) - metric(b), or None.

    The examples of each pairing are resampled on their own; errors as in `resample_differences`.
    """
    drawn = [
        resample_differences(
            one.metric,
            one.labels,
            [one.predictions_a],
            [one.predictions_b],
            one.space,
            num_resamples=num_resamples,
            seed=seed + number,
        )
        for number, one in enumerate(pairings)
    ]
    return mean_over_tasks(drawn).interval(confidence)


def mean_over_tasks(parts: Sequence[Resampled]) -> Resampled:
    """Average what was found on several tasks, with equally many samples each."""
    return Resampled(
        float(np.mean([part.observed for part in parts])),
        np.mean([part.samples for part in parts], axis=0),
        tuple(gaps for part in parts for gaps in part.by_seed),
    )


def resample_differences(
    metric: str,
    labels: ArrayLike,
    predictions_a: Sequence[ArrayLike],
    predictions_b: Sequence[ArrayLike],
    space: LabelSpace,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Resampled:
    """Draw bootstrap samples of the mean difference of two models that were trained with S seeds.

    Each draws S seeds and N examples with replacement (samples, documents, questions: whatever an
    answer is given to); both models answer the same ones. Which
    seeds are drawn depends on S alone, so that tasks that one model learned together stay together
    in `mean_over_tasks`.

    Args:
        metric: a name out of METRICS.
        labels: class ids or values (N,).
        predictions_a: S entries as in `compute_metrics`, one for each seed.
        predictions_b: S entries of the same seeds and examples.
        space: the task's classes, which decide how both models and every resample are measured.
        num_resamples: R, bootstrap samples to draw.
        seed: fixes the examples.

    Returns:
        The mean over the seeds of metric(a) - metric(b), and R samples of it.

    Raises:
        DataError: for an unknown metric, different lengths, no seeds or examples, or non-finite
            values.
    """
    check_names([metric])
    if not predictions_a or len(predictions_a) != len(predictions_b):
        raise DataError(
            f"{metric}: {len(predictions_a)} and {len(predictions_b)} seeds cannot be compared",
            remedy="give both models' predictions for each seed",
        )
    score = METRICS[metric].compute
    pairs = [
        tuple(check_answers(metric, said, labels, space)[1] for said in (first, second))
        for first, second in zip(predictions_a, predictions_b, strict=True)
    ]
    true = np.asarray(labels)

    def difference(number: int, chosen: NDArray[np.int64]) -> float:
        first, second = pairs[number]
        rows = true[chosen]
        return score(rows, first[chosen], space) - score(rows, second[chosen], space)

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
    by_seed = np.array([difference(k, everything) for k in range(num_seeds)])
    return Resampled(float(by_seed.mean()), samples, (by_seed,))
