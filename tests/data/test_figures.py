"""Metrics of what each document, question or pair was given in figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import CHRF
from scipy import stats

from moe_dist.data.figures import CHRF_COLUMNS, chrf
from moe_dist.data.metrics import (
    METRICS,
    LabelSpace,
    compute_metrics,
    explain_undefined,
    metric_title,
    undefined_by_labels,
)
from moe_dist.errors import DataError

LANGUAGE = LabelSpace(None, columns=("nll", "tokens", "words", "bytes"))
VECTORS = LabelSpace(None, columns=("cosine", "rank"))
DOCUMENTS = np.array([[30.0, 10, 6, 40], [10.0, 10, 9, 44]], np.float32)
NO_LABELS = np.full(2, np.nan)


def test_rates_of_language_models_weigh_documents_by_their_length() -> None:
    names = ["perplexity", "word_perplexity", "bits_per_byte"]
    assert compute_metrics(names, DOCUMENTS, NO_LABELS, LANGUAGE) == pytest.approx(
        {
            "perplexity": math.exp(40 / 20),
            "word_perplexity": math.exp(40 / 15),
            "bits_per_byte": 40 / math.log(2) / 84,
        }
    )
    assert [METRICS[name].higher_is_better for name in names] == [False] * 3
    assert metric_title("word_perplexity", LANGUAGE) == "perplexity by word"


@pytest.mark.parametrize(
    ("name", "figures", "why"),
    [
        ("word_perplexity", [9.0, 4, 0, 12], "there are no words"),
        ("bits_per_byte", [9.0, 4, 3, 0], "there are no bytes"),
        (
            "word_perplexity",
            [4000.0, 400, 1, 12],
            "4000 nats for each of the words are too many for a finite value",
        ),
    ],
)
def test_rates_that_are_not_finite_are_undefined(name: str, figures: Any, why: str) -> None:
    assert math.isnan(compute_metrics([name], [figures], [0.0], LANGUAGE)[name])
    assert explain_undefined(name, [figures], [0.0], LANGUAGE) == why
    assert undefined_by_labels(name, [0.0], LANGUAGE) is None


def test_retrieval_is_measured_by_ranks() -> None:
    figures = [[0.9, 1], [0.8, 2], [0.7, 10], [0.2, 11]]
    found = compute_metrics(["recall_at_1", "recall_at_10", "mrr"], figures, [0.0] * 4, VECTORS)
    assert found == pytest.approx(
        {"recall_at_1": 0.25, "recall_at_10": 0.75, "mrr": (1 + 1 / 2 + 1 / 10 + 1 / 11) / 4}
    )


def test_scored_pairs_are_measured_by_the_correlation_of_cosines() -> None:
    rng = np.random.default_rng(0)
    scores = np.round(rng.random(50) * 5)
    cosines = scores / 5 + rng.normal(size=50)
    space = LabelSpace(None, columns=("cosine",))
    found = compute_metrics(["cosine_spearman", "cosine_pearson"], cosines[:, None], scores, space)
    assert found["cosine_spearman"] == pytest.approx(stats.spearmanr(scores, cosines).statistic)
    assert found["cosine_pearson"] == pytest.approx(stats.pearsonr(scores, cosines).statistic)


@pytest.mark.parametrize(
    ("cosines", "scores", "why", "by_labels"),
    [
        ([[0.1], [0.2]], [3.0, 3.0], "all 2 labels are equal (3)", True),
        ([[0.5], [0.5]], [3.0, 4.0], "all 2 cosines are equal (0.5)", False),
    ],
)
def test_a_correlation_of_constants_is_undefined(
    cosines: Any, scores: Any, why: str, by_labels: bool
) -> None:
    space = LabelSpace(None, columns=("cosine",))
    assert explain_undefined("cosine_pearson", cosines, scores, space) == why
    said = undefined_by_labels("cosine_pearson", scores, space)
    assert said == (why if by_labels else None)


def test_answers_are_measured_by_means() -> None:
    space = LabelSpace(None, columns=("exact", "f1", "rouge1", "rougeL"))
    figures = [[1, 1, 0.5, 0.25], [0, 0.5, 0.25, 0.25], [0, 0, 0, 0.25]]
    names = ["exact_match", "answer_f1", "rouge1", "rougeL"]
    assert compute_metrics(names, figures, [0.0] * 3, space) == pytest.approx(
        {"exact_match": 1 / 3, "answer_f1": 0.5, "rouge1": 0.25, "rougeL": 0.25}
    )


def test_chrf_of_a_resample_is_that_of_the_official_scorer() -> None:
    answers = ["the cat sat on a mat", "", "nothing alike", "übergroße Katzen"]
    references = ["the cat is on the mat", "not empty", "qqq", "große Katze"]
    scorer = CHRF()
    counts = np.array(
        [
            scorer._compute_segment_statistics(answer, scorer._extract_reference_info([reference]))
            for answer, reference in zip(answers, references, strict=True)
        ],
        np.float32,
    )
    space = LabelSpace(None, columns=CHRF_COLUMNS)
    for chosen in ([0, 1, 2, 3], [0, 0, 3], [1], [2], [3, 3, 2]):
        expected = scorer.corpus_score(
            [answers[i] for i in chosen], [[references[i] for i in chosen]]
        )
        found = compute_metrics(["chrf"], counts[chosen], [0.0] * len(chosen), space)["chrf"]
        assert 100 * found == pytest.approx(expected.score)
    assert chrf(counts[:1].astype(float)) == pytest.approx(chrf(counts[[0, 0]].astype(float)))


@pytest.mark.parametrize(
    ("name", "figures", "space", "message"),
    [
        (
            "accuracy",
            DOCUMENTS,
            LANGUAGE,
            "accuracy is for predictions, and this task has nll, tok",
        ),
        ("pearson", DOCUMENTS, LANGUAGE, "pearson is for predictions, and this task has nll"),
        ("mrr", DOCUMENTS, LANGUAGE, "mrr reads rank, and this task has nll"),
        (
            "perplexity",
            [[0.1], [0.2]],
            LabelSpace(None),
            "reads nll, tokens, and this task has pre",
        ),
        ("perplexity", DOCUMENTS[:, :2], LANGUAGE, r"figures \(2, 2\) are not those of nll, tok"),
        ("perplexity", DOCUMENTS[:1], LANGUAGE, "do not belong together"),
        ("perplexity", DOCUMENTS * np.nan, LANGUAGE, "2 of 2 predictions are NaN"),
        ("cosine_pearson", [[0.1, 1], [0.2, 1]], VECTORS, "labels are NaN"),
    ],
)
def test_faults_are_named(name: str, figures: Any, space: LabelSpace, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compute_metrics([name], figures, NO_LABELS, space)


def test_no_examples_are_named() -> None:
    for columns in (("nll", "tokens"), ("nll", "tokens", "bytes")):
        with pytest.raises(DataError, match="there are no examples"):
            compute_metrics(
                ["perplexity"], np.zeros((0, len(columns))), [], LabelSpace(None, columns=columns)
            )


def test_only_the_figures_that_a_metric_reads_must_be_finite() -> None:
    figures = [[np.nan, 1], [np.nan, 2]]
    assert compute_metrics(["mrr"], figures, NO_LABELS, VECTORS) == {"mrr": 0.75}
