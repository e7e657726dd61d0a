"""How sure a difference is: over examples, over seeds, and where a metric is undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from moe_dist.data.metrics import LabelSpace
from moe_dist.errors import DataError
from moe_dist.measure.bootstrap import (
    Interval,
    Resampled,
    mean_over_tasks,
    paired_bootstrap,
    resample_differences,
    resample_mean_differences,
    seeded_bootstrap,
)

TWO, THREE, VALUES = LabelSpace(2), LabelSpace(3), LabelSpace(None)


def sure(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


def test_bootstrap_of_equal_models_is_zero() -> None:
    labels = np.arange(100) % 2
    interval = sure(paired_bootstrap("accuracy", labels, labels, labels, TWO, num_resamples=100))
    assert (interval.difference, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert interval.p_value == 1.0


def test_bootstrap_finds_a_clear_difference() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 500)
    worse = np.where(rng.random(500) < 0.2, 1 - labels, labels)
    interval = sure(paired_bootstrap("accuracy", labels, labels, worse, TWO, num_resamples=500))
    assert 0.1 < interval.low < interval.difference < interval.high < 0.3
    assert interval.p_value < 0.01
    mirrored = sure(paired_bootstrap("accuracy", labels, worse, labels, TWO, num_resamples=500))
    assert mirrored.high == pytest.approx(-interval.low)


def test_bootstrap_interval_has_the_width_theory_gives() -> None:
    rng = np.random.default_rng(2)
    labels = np.zeros(1000, np.int64)
    first, second = (rng.random((2, 1000)) < 0.3).astype(np.int64)
    interval = sure(paired_bootstrap("accuracy", labels, first, second, TWO, num_resamples=2000))
    deviation = np.std((first == labels).astype(float) - (second == labels)) / np.sqrt(1000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert interval == paired_bootstrap("accuracy", labels, first, second, TWO, num_resamples=2000)


def test_pairs_make_the_interval_narrow() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 400)
    first = np.where(rng.random(400) < 0.3, 1 - labels, labels)
    second = first.copy()
    second[:4] = 1 - second[:4]
    interval = sure(paired_bootstrap("matthews", labels, first, second, TWO, num_resamples=300))
    assert interval.high - interval.low < 0.05


def test_seeds_widen_the_interval_and_one_seed_does_not() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 300)

    def answers(wrong: float) -> np.ndarray:
        return np.where(rng.random(300) < wrong, 1 - labels, labels)

    ours, theirs = [answers(w) for w in (0.05, 0.25, 0.1)], [answers(0.2) for _ in range(3)]
    found = sure(seeded_bootstrap("accuracy", labels, ours, theirs, TWO, num_resamples=500))
    pairs = zip(ours, theirs, strict=True)
    alone = [sure(paired_bootstrap("accuracy", labels, a, b, TWO)) for a, b in pairs]
    assert found.difference == pytest.approx(np.mean([one.difference for one in alone]))
    # The middle seed loses, the others win: over examples alone this would be clear.
    assert found.low < 0 < found.high
    assert alone[0] == seeded_bootstrap("accuracy", labels, ours[:1], theirs[:1], TWO)
    with pytest.raises(DataError):
        seeded_bootstrap("accuracy", labels, ours, [labels[:5]] * 3, TWO)


def test_mean_errors_are_resampled_like_any_metric() -> None:
    """Errors of 0 and 1 are accuracy by another name: samples agree to the last one."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 120)
    answers = rng.integers(0, 2, (2, 3, 120))
    expected = resample_differences(
        "accuracy", labels, list(answers[0]), list(answers[1]), TWO, seed=4
    )
    wrong = (answers != labels).astype(np.float32)
    found = resample_mean_differences(list(wrong[0]), list(wrong[1]), seed=4)
    assert found.observed == pytest.approx(-expected.observed)
    np.testing.assert_allclose(found.samples, -expected.samples, atol=1e-12)


def test_errors_that_do_not_belong_together_are_refused() -> None:
    one, other = np.zeros(4), np.ones(5)
    for first, second in (([one], [other]), ([one], []), ([one, other], [one, other])):
        with pytest.raises(DataError, match=r"cannot be compared|belong together"):
            resample_mean_differences(first, second)
    with pytest.raises(DataError, match="NaN"):
        resample_mean_differences([one], [one * np.nan])


def test_every_resample_is_measured_as_the_task_is() -> None:
    """A rare third class is missing from many resamples, whose F1 stays the mean over three."""
    rng = np.random.default_rng(6)
    labels = np.r_[rng.integers(0, 2, 40), 2]
    first, second = (np.where(rng.random(41) < wrong, 0, labels) for wrong in (0.1, 0.4))
    found = resample_differences("f1", labels, [first], [second], THREE, num_resamples=60, seed=3)
    draws = np.random.default_rng(3)
    for sample in found.samples:
        rows = draws.integers(0, 41, 41)
        scores = [
            reference.f1_score(
                labels[rows], said[rows], average="macro", labels=range(3), zero_division=0
            )
            for said in (first, second)
        ]
        assert sample == pytest.approx(scores[0] - scores[1])


def test_resamples_without_a_value_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(7)
    labels = np.r_[np.ones(3, int), np.zeros(57, int)]
    first, second = (np.where(rng.random(60) < wrong, 1 - labels, labels) for wrong in (0.0, 0.2))
    drawn = resample_differences("f1", labels, [first], [second], TWO)
    interval = sure(drawn.interval())
    # (57 / 60) ** 60 of the resamples draw no example of the positive class.
    assert interval.num_undefined == np.isnan(drawn.samples).sum() == pytest.approx(92, abs=40)
    kept = drawn.samples[~np.isnan(drawn.samples)]
    assert interval.bootstrap == pytest.approx(tuple(np.quantile(kept, [0.025, 0.975])))


@pytest.mark.parametrize("metric", ["matthews", "f1", "pearson", "spearman"])
def test_what_is_undefined_has_no_interval(metric: str) -> None:
    space = TWO if metric in ("matthews", "f1") else VALUES
    labels = np.zeros(20, int)
    guess = np.arange(20) % 2
    drawn = resample_differences(metric, labels, [guess], [1 - guess], space, num_resamples=50)
    assert math.isnan(drawn.observed) and drawn.interval() is None
    mean = mean_over_tasks([drawn, resample_mean_differences([guess], [labels], num_resamples=50)])
    assert mean.interval() is None


def test_a_metric_that_few_resamples_have_has_no_interval() -> None:
    samples = np.r_[np.full(51, np.nan), np.zeros(49)]
    assert Resampled(0.1, samples, (np.array([0.1]),)).interval() is None
    assert Resampled(0.1, samples[2:], (np.array([0.1]),)).interval() is not None


def test_of_bootstrap_and_student_t_the_wider_one_counts() -> None:
    samples = np.linspace(-0.01, 0.03, 401)
    steady = sure(Resampled(0.01, samples, (np.array([0.010, 0.011, 0.009]),)).interval())
    assert (steady.low, steady.high) == steady.bootstrap == pytest.approx((-0.009, 0.029))
    assert steady.over_seeds == pytest.approx((0.01 - 0.002484, 0.01 + 0.002484), abs=1e-5)
    gaps = np.array([0.04, -0.02, 0.01])
    lucky = sure(Resampled(0.01, samples, (gaps,)).interval())
    assert (lucky.low, lucky.high) == lucky.over_seeds
    assert lucky.high - lucky.low == pytest.approx(2 * 4.3027 * 0.03 / 3**0.5, rel=1e-3)
    assert lucky.num_seeds == 3
    assert lucky.p_value == pytest.approx(0.622, abs=0.01)
    one = sure(Resampled(0.01, samples, (gaps[:1],)).interval())
    assert (one.over_seeds, one.num_seeds) == (None, 1)


def test_seeds_of_several_tasks_stay_together_where_all_tasks_have_them() -> None:
    samples = np.zeros(100)
    first, second = np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.2, 0.1])
    parts = [Resampled(0.2, samples, (gaps,)) for gaps in (first, second)]
    together = sure(mean_over_tasks(parts).interval())
    assert together.over_seeds == pytest.approx((0.2, 0.2))
    # With two seeds of one task nothing says which belong together: the surer guess is not taken.
    parts[1] = Resampled(0.2, samples, (second[:2],))
    apart = sure(mean_over_tasks(parts).interval())
    assert apart.num_seeds == 2 and apart.over_seeds is not None
    assert apart.over_seeds[1] - 0.2 == pytest.approx(12.706 * (0.1 / 3**0.5 + 0.05) / 2, rel=1e-3)


@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0])
def test_the_wider_interval_covers_what_it_claims(spread: float) -> None:
    """Three seeds whose spread is 1, 3 and 10 times the standard error over the examples."""
    rng = np.random.default_rng(8)
    num_runs, num_examples = 300, 100
    hits = alone = 0
    for _ in range(num_runs):
        examples = rng.normal(size=num_examples)
        effects = rng.normal(scale=spread / num_examples**0.5, size=3)
        gaps = [examples + effect for effect in effects]
        zeros = [np.zeros(num_examples)] * 3
        drawn = resample_mean_differences(
            gaps, zeros, num_resamples=300, seed=int(rng.integers(1 << 31))
        )
        interval = sure(drawn.interval())
        hits += interval.low <= 0 <= interval.high
        alone += interval.bootstrap[0] <= 0 <= interval.bootstrap[1]
    assert 0.92 <= hits / num_runs <= 0.98
    # The bootstrap by itself does not, which is why it is not quoted by itself.
    assert alone <= hits and (spread < 3 or alone / num_runs < 0.9)


def test_bootstrap_resamples_the_documents_of_a_language_model() -> None:
    """Rates of sums are those of each resample, and not means over documents."""
    rng = np.random.default_rng(4)
    space = LabelSpace(None, columns=("nll", "tokens"))
    tokens = rng.integers(5, 400, 200).astype(np.float32)
    better = np.stack([3.0 * tokens, tokens], 1)
    worse = np.stack([3.0 * tokens + rng.random(200) * tokens, tokens], 1)
    drawn = resample_differences(
        "perplexity", np.zeros(200), [worse], [better], space, num_resamples=300
    )
    rows = np.random.default_rng(0).integers(0, 200, 200)
    expected = math.exp(worse[rows, 0].sum() / tokens[rows].sum()) - math.exp(3.0)
    assert drawn.samples[0] == pytest.approx(expected, rel=1e-5)
    interval = sure(drawn.interval())
    assert 8 < interval.low < interval.difference < interval.high < 20
