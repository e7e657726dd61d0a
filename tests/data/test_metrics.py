from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from moe_dist.data.metrics import (
    compute_metrics,
    paired_bootstrap,
    resample_differences,
    resample_mean_differences,
    seeded_bootstrap,
)
from moe_dist.errors import DataError


@pytest.mark.parametrize("num_classes", [2, 3])
def test_class_metrics_agree_with_scikit_learn(num_classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, 200)
    guess = np.where(rng.random(200) < 0.6, labels, rng.integers(0, num_classes, 200))
    found = compute_metrics(["accuracy", "f1", "matthews"], guess, labels)
    average: Any = "binary" if num_classes == 2 else "macro"
    assert found == pytest.approx(
        {
            "accuracy": reference.accuracy_score(labels, guess),
            "f1": reference.f1_score(labels, guess, average=average),
            "matthews": reference.matthews_corrcoef(labels, guess),
        }
    )


def test_correlations_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    labels = np.round(rng.random(100) * 5)
    guess = labels + rng.normal(size=100)
    found = compute_metrics(["pearson", "spearman"], guess, labels)
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, guess).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(labels, guess).statistic)


def test_logits_are_accepted() -> None:
    logits = np.array([[0.1, 2.0], [3.0, -1.0], [0.0, 1.0]])
    assert compute_metrics(["accuracy"], logits, [1, 0, 0]) == {"accuracy": pytest.approx(2 / 3)}
    assert compute_metrics(["pearson"], [[1.0], [2.0], [3.0]], [2.0, 4.0, 6.0]) == {
        "pearson": pytest.approx(1.0)
    }


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
def test_undefined_values_are_zero(name: str) -> None:
    assert compute_metrics([name], [0, 0, 0], [0, 0, 0]) == {name: 0.0}


@pytest.mark.parametrize(
    ("names", "predictions", "labels", "message"),
    [
        (["bleu"], [1], [1], "unknown metric: bleu"),
        (["accuracy"], [1, 0], [1], "do not belong together"),
        (["accuracy"], [], [], "no examples"),
        (["pearson"], [np.nan, 1.0], [0.0, 1.0], "NaN"),
        (["accuracy"], [[np.inf, 1.0]], [0], "NaN or infinity"),
    ],
)
def test_faults_are_named(names: list[str], predictions: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compute_metrics(names, predictions, labels)


def test_bootstrap_of_equal_models_is_zero() -> None:
    labels = np.arange(100) % 2
    interval = paired_bootstrap("accuracy", labels, labels, labels, num_resamples=100)
    assert (interval.difference, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert interval.p_value == 1.0


def test_bootstrap_finds_a_clear_difference() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 500)
    worse = np.where(rng.random(500) < 0.2, 1 - labels, labels)
    interval = paired_bootstrap("accuracy", labels, labels, worse, num_resamples=500)
    assert 0.1 < interval.low < interval.difference < interval.high < 0.3
    assert interval.p_value < 0.01
    mirrored = paired_bootstrap("accuracy", labels, worse, labels, num_resamples=500)
    assert mirrored.high == pytest.approx(-interval.low)


def test_bootstrap_interval_has_the_width_theory_gives() -> None:
    rng = np.random.default_rng(2)
    labels = np.zeros(1000, np.int64)
    first, second = (rng.random((2, 1000)) < 0.3).astype(np.int64)
    interval = paired_bootstrap("accuracy", labels, first, second, num_resamples=2000)
    deviation = np.std((first == labels).astype(float) - (second == labels)) / np.sqrt(1000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert interval == paired_bootstrap("accuracy", labels, first, second, num_resamples=2000)


def test_pairs_make_the_interval_narrow() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 400)
    first = np.where(rng.random(400) < 0.3, 1 - labels, labels)
    second = first.copy()
    second[:4] = 1 - second[:4]
    interval = paired_bootstrap("matthews", labels, first, second, num_resamples=300)
    assert interval.high - interval.low < 0.05


def test_seeds_widen_the_interval_and_one_seed_does_not() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 300)

    def answers(wrong: float) -> np.ndarray:
        return np.where(rng.random(300) < wrong, 1 - labels, labels)

    ours, theirs = [answers(w) for w in (0.05, 0.25, 0.1)], [answers(0.2) for _ in range(3)]
    found = seeded_bootstrap("accuracy", labels, ours, theirs, num_resamples=500)
    alone = [paired_bootstrap("accuracy", labels, a, b) for a, b in zip(ours, theirs, strict=True)]
    assert found.difference == pytest.approx(np.mean([one.difference for one in alone]))
    # The middle seed loses, the others win: over examples alone this would be clear.
    assert found.low < 0 < found.high
    assert alone[0] == seeded_bootstrap("accuracy", labels, ours[:1], theirs[:1])
    with pytest.raises(DataError):
        seeded_bootstrap("accuracy", labels, ours, [labels[:5]] * 3)


def test_mean_errors_are_resampled_like_any_metric() -> None:
    """Errors of 0 and 1 are accuracy by another name: samples agree to the last one."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 120)
    answers = rng.integers(0, 2, (2, 3, 120))
    expected = resample_differences("accuracy", labels, list(answers[0]), list(answers[1]), seed=4)
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
