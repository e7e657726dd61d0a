from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from moe_dist.config.data_checks import METRICS_OF_KINDS
from moe_dist.config.search_section import MEASURES
from moe_dist.data.metrics import (
    METRICS,
    LabelSpace,
    compute_metrics,
    explain_undefined,
    metric_title,
    missing_classes,
    undefined_by_labels,
)
from moe_dist.errors import DataError
from moe_dist.tasks import TASK_KINDS

TWO, THREE, VALUES = LabelSpace(2), LabelSpace(3, names=("a", "b", "c")), LabelSpace(None)
CLASS_METRICS = ["accuracy", "f1", "matthews"]


@pytest.mark.parametrize("positive", [0, 1])
@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("num_occurring", [2, 3, 7])
def test_class_metrics_agree_with_scikit_learn(
    num_classes: int, num_occurring: int, positive: int
) -> None:
    """Whatever classes occur among the labels or the predictions: the task's number decides."""
    rng = np.random.default_rng(0)
    occurring = min(num_classes, num_occurring)
    labels = rng.integers(0, occurring, 200)
    guess = np.where(rng.random(200) < 0.6, labels, rng.integers(0, num_classes, 200))
    found = compute_metrics(CLASS_METRICS, guess, labels, LabelSpace(num_classes, positive))
    about: Any = (
        {"pos_label": positive}
        if num_classes == 2
        else {"average": "macro", "labels": range(num_classes)}
    )
    assert found == pytest.approx(
        {
            "accuracy": reference.accuracy_score(labels, guess),
            "f1": reference.f1_score(labels, guess, zero_division=0, **about),
            "matthews": reference.matthews_corrcoef(labels, guess),
        }
    )


EDGES: dict[str, tuple[list[int], list[int]]] = {
    "all right": ([0, 1, 2, 1], [0, 1, 2, 1]),
    "all wrong": ([0, 1, 2, 1], [1, 2, 0, 0]),
    "a class without labels": ([0, 1, 0, 1], [0, 2, 0, 1]),
    "a class without predictions": ([0, 1, 2, 2], [0, 1, 0, 1]),
    "a class that nobody names": ([0, 1, 0, 1], [0, 1, 1, 1]),
    "labels of one class": ([1, 1, 1], [0, 1, 2]),
    "predictions of one class": ([0, 1, 2], [1, 1, 1]),
    "one class": ([1, 1], [1, 1]),
    "two that never meet": ([0, 0], [1, 1]),
    "a single row": ([2], [2]),
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("positive", [0, 1])
def test_class_metrics_agree_with_scikit_learn_at_the_edges(
    case: str, num_classes: int, positive: int
) -> None:
    labels, guess = (np.array(ids) % num_classes for ids in EDGES[case])
    found = compute_metrics(CLASS_METRICS, guess, labels, LabelSpace(num_classes, positive))
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, guess))
    about: Any = (
        {"labels": [positive], "average": "macro"}
        if num_classes == 2
        else {"labels": range(num_classes), "average": "macro"}
    )
    # Where scikit-learn says 0 for want of a value, there is none here.
    if num_classes == 2 and positive not in labels:
        assert math.isnan(found["f1"])
    else:
        expected = reference.f1_score(labels, guess, zero_division=0, **about)
        assert found["f1"] == pytest.approx(expected)
    if len(set(labels)) == 1 or len(set(guess)) == 1:
        assert math.isnan(found["matthews"])
    else:
        assert found["matthews"] == pytest.approx(reference.matthews_corrcoef(labels, guess))


def test_one_prediction_of_a_class_that_does_not_occur_changes_f1_a_little() -> None:
    labels = np.arange(40) % 2
    guess = labels.copy()
    without = compute_metrics(["f1"], guess, labels, THREE)["f1"]
    guess[0] = 2
    assert without == pytest.approx(2 / 3)
    assert 0 < without - compute_metrics(["f1"], guess, labels, THREE)["f1"] < 0.02
    assert missing_classes("f1", labels, THREE) == ["c"]
    assert missing_classes("f1", labels, TWO) == missing_classes("matthews", labels, THREE) == []


def test_a_model_that_says_one_class_to_all_has_its_share_of_the_mean() -> None:
    labels = np.arange(40) % 2
    for said in (0, 1):
        found = compute_metrics(["f1"], np.full(40, said), labels, THREE)["f1"]
        assert found == pytest.approx((2 / 3) / 3)


def test_f1_names_the_class_that_it_is_about() -> None:
    space = LabelSpace(2, 0, ("fraud", "ok"))
    labels = np.r_[np.zeros(5, int), np.ones(95, int)]
    assert compute_metrics(["f1"], np.ones(100, int), labels, space) == {"f1": 0.0}
    assert metric_title("f1", space) == "f1 of fraud"
    assert metric_title("f1", LabelSpace(2)) == "f1 of 1"
    assert metric_title("f1", THREE) == "macro f1"
    assert metric_title("accuracy", space) == "accuracy"


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200, 1e307])
def test_correlations_agree_with_scipy(scale: float) -> None:
    rng = np.random.default_rng(0)
    labels = np.round(rng.random(100) * 5)
    guess = labels + rng.normal(size=100)
    found = compute_metrics(["pearson", "spearman"], guess * scale, labels, VALUES)
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, guess).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(labels, guess).statistic)


PAIRS: dict[str, tuple[list[float], list[float]]] = {
    "ties in both": ([1, 1, 2, 2, 3, 3], [2, 1, 1, 2, 2, 2]),
    "ties in labels": ([0, 0, 0, 1], [0.1, 0.3, 0.2, 0.4]),
    "all ties but one": ([5, 5, 5, 5, 6], [1, 2, 3, 4, 5]),
    "the same": ([1, 2, 3], [1, 2, 3]),
    "against": ([1, 2, 3], [3, 2, 1]),
    "two rows": ([1, 2], [5, 3]),
    "in order, not in line": ([1, 2, 3, 4], [1, 10, 100, 1e6]),
    "nothing to see": ([1, 2, 1, 2], [1, 1, 2, 2]),
    "far from 0": ([1e9 + 1, 1e9 + 2, 1e9 + 4], [1, 2, 3]),
    "constant labels": ([0.1, 0.1, 0.1], [1, 2, 3]),
    "constant predictions": ([1, 2, 3], [0.1, 0.1, 0.1]),
    "constants": ([0, 0], [0, 0]),
}


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_agree_with_scipy_at_the_edges(case: str, name: str) -> None:
    labels, guess = map(np.array, PAIRS[case])
    expected = getattr(stats, f"{name}r")(labels, guess).statistic
    found = compute_metrics([name], guess, labels, VALUES)[name]
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-12)


@pytest.mark.filterwarnings("ignore::scipy.stats.NearConstantInputWarning")
def test_what_differs_by_rounding_alone_is_constant() -> None:
    """SciPy warns of such values, and correlates their rounding."""
    labels, guess = np.arange(4.0), np.array([0.3, 0.1 + 0.2, 0.3, 0.1 + 0.2])
    assert math.isfinite(stats.pearsonr(labels, guess).statistic)
    assert math.isnan(compute_metrics(["pearson"], guess, labels, VALUES)["pearson"])


def test_logits_are_accepted() -> None:
    logits = np.array([[0.1, 2.0], [3.0, -1.0], [0.0, 1.0]])
    found = compute_metrics(["accuracy"], logits, [1, 0, 0], TWO)
    assert found == {"accuracy": pytest.approx(2 / 3)}
    assert compute_metrics(["pearson"], [[1.0], [2.0], [3.0]], [2.0, 4.0, 6.0], VALUES) == {
        "pearson": pytest.approx(1.0)
    }


GOOD = LabelSpace(2, names=("bad", "good"))


@pytest.mark.parametrize(
    ("name", "guess", "labels", "space", "why", "by_labels"),
    [
        ("f1", [0, 1, 0], [0, 0, 0], GOOD, "none of the 3 labels is 'good'", True),
        ("matthews", [0, 1, 0], [1, 1, 1], GOOD, "all 3 labels are 'good'", True),
        ("matthews", [2, 1, 0], [2, 2, 2], THREE, "all 3 labels are 'c'", True),
        ("matthews", [1, 1, 1], [0, 1, 1], GOOD, "all 3 predictions are 'good'", False),
        ("pearson", [1.0, 2.0], [0.1, 0.1], VALUES, "all 2 labels are equal (0.1)", True),
        ("pearson", [0.1] * 7, range(7), VALUES, "all 7 predictions are equal (0.1)", False),
        ("spearman", [3.5] * 5, range(5), VALUES, "all 5 predictions are equal (3.5)", False),
        ("spearman", [3.5], [1.0], VALUES, "all 1 labels are equal (1)", True),
    ],
)
def test_undefined_is_no_zero_and_says_why(
    name: str, guess: Any, labels: Any, space: LabelSpace, why: str, by_labels: bool
) -> None:
    assert math.isnan(compute_metrics([name], guess, list(labels), space)[name])
    assert explain_undefined(name, guess, list(labels), space) == why
    assert undefined_by_labels(name, list(labels), space) == (why if by_labels else None)


@pytest.mark.parametrize("name", METRICS)
def test_what_has_a_value_needs_no_reason(name: str) -> None:
    rng = np.random.default_rng(1)
    metric = METRICS[name]
    space = GOOD if metric.on_classes else LabelSpace(None, columns=metric.columns)
    labels, guess = rng.integers(0, 2, (2, 30))
    answers = rng.integers(1, 4, (30, len(metric.columns))) if metric.columns else guess
    assert math.isfinite(compute_metrics([name], answers, labels, space)[name])
    assert explain_undefined(name, answers, labels, space) is None


def test_metrics_keep_the_order_that_they_are_asked_in() -> None:
    assert compute_metrics(["accuracy", "f1"], [1, 0], [1, 1], GOOD) == {
        "accuracy": 0.5,
        "f1": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("names", "predictions", "labels", "space", "message"),
    [
        (["bleu"], [1], [1], TWO, "unknown metric: bleu"),
        (["accuracy"], [1, 0], [1], TWO, "do not belong together"),
        (["accuracy"], [], [], TWO, "no examples"),
        (["pearson"], [np.nan, 1.0], [0.0, 1.0], VALUES, "1 of 2 predictions are NaN"),
        (["pearson"], [np.inf, 1.0], [0.0, 1.0], VALUES, "1 of 2 predictions are NaN or infinite"),
        (["accuracy"], [[np.inf, 1.0]], [0], TWO, "1 of 1 predictions are NaN or infinite"),
        (["f1"], [[np.nan, 1.0], [0, 1]], [0, 1], TWO, "1 of 2 predictions are NaN or infinite"),
        (["pearson"], [0.0, 1.0], [np.nan, 1.0], VALUES, "labels are NaN or infinite"),
        (["f1"], [0, 2], [0, 1], TWO, "prediction 2 is none of the task's 2 classes"),
        (["matthews"], [0, 1], [0, -1], TWO, "label -1 is none of the task's 2 classes"),
        (["accuracy"], [0.5, 1.0], [0, 1], TWO, "prediction 0.5 is none"),
        (["f1"], [0, 1], [0, 1], VALUES, "this is a regression"),
    ],
)
def test_faults_are_named(
    names: list[str], predictions: Any, labels: Any, space: LabelSpace, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        compute_metrics(names, predictions, labels, space)


def test_recipes_know_the_metrics_and_their_directions() -> None:
    """The recipe's models load nothing heavy, so that they name them once more."""
    named = {metric for metrics in METRICS_OF_KINDS.values() for metric in metrics}
    assert named == set(METRICS)
    for name, metric in METRICS.items():
        assert MEASURES[name] == ("max" if metric.higher_is_better else "min"), name
    for kind in TASK_KINDS.values():
        assert set(METRICS_OF_KINDS[kind.name]) == set(kind.metrics)  # type: ignore[index]
