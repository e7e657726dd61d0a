"""Scores of answers in words, against the official scorers."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from moe_dist.data.metrics import LabelSpace, compute_metrics
from moe_dist.tasks.text_scores import (
    CHRF_COLUMNS,
    ROUGE_COLUMNS,
    answer_figures,
    best_threshold,
    chrf_figures,
    normalise_answer,
    rouge_figures,
)

ANSWERS = [
    "The quick brown foxes jumped over a lazy dog.\nThey were running.",
    "",
    "A summary of nothing at all",
    "über große Katzen",
]
REFERENCES = [
    ["the quick brown fox jumps over the lazy dog\nhe ran", "some dogs are lazy"],
    ["not empty"],
    ["Nothing is summarised"],
    ["Große Katzen über uns"],
]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Eiffel-Tower's  top, a view", "eiffeltowers top view"),
        ("an apple a day; the end", "apple day end"),
        ("  theatre another\tAnne ", "theatre another anne"),
        ("U.S.A.", "usa"),
        ("the", ""),
        ("!?", ""),
        ("$1,000.50", "100050"),
        ("“quoted”", "“quoted”"),
    ],
)
def test_answers_are_normalised_as_squad_does(text: str, plain: str) -> None:
    assert normalise_answer(text) == plain


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("the Denver Broncos", ["Denver Broncos", "Broncos"], 1, 1),
        ("Broncos!", ["Denver Broncos"], 0, 2 / 3),
        ("Denver Broncos of Colorado", ["Broncos", "Denver, Colorado"], 0, 2 * 2 / 6),
        ("ha ha ha", ["ha ha"], 0, 4 / 5),
        ("Panthers", ["Denver Broncos"], 0, 0),
        ("", ["Denver Broncos"], 0, 0),
        ("the", ["Denver"], 0, 0),
        ("", [""], 1, 1),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("a", [""], 1, 1),
        # Of right answers those of articles alone do not count where there are others.
        ("an", ["the", "Denver"], 0, 0),
    ],
)
def test_answers_are_scored_as_squad_does(
    answer: str, gold: list[str], exact: float, f1: float
) -> None:
    assert answer_figures([answer], [gold])[0] == pytest.approx([exact, f1])


def official_threshold(
    no_answer: np.ndarray, f1: np.ndarray, has_answer: np.ndarray
) -> tuple[float, float]:
    """`find_best_thresh` of the script of SQuAD 2.0, every question answered."""
    current = best = float(np.sum(~has_answer))
    threshold = 0.0
    for index in np.argsort(no_answer, kind="stable"):
        current += f1[index] if has_answer[index] else -1
        if current > best:
            best, threshold = current, float(no_answer[index])
    return threshold, best / len(f1)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_that_of_squads_script(seed: int) -> None:
    rng = np.random.default_rng(seed)
    has_answer = rng.random(300) < 0.5
    f1 = np.where(has_answer, rng.choice([0.0, 0.5, 1.0], 300), 0.0)
    no_answer = np.clip(rng.normal(np.where(has_answer, 0.4, 0.6), 0.1), 0.01, 0.99)
    threshold, mean = best_threshold(no_answer, f1, has_answer)
    assert (threshold, mean) == pytest.approx(official_threshold(no_answer, f1, has_answer))
    answered = no_answer <= threshold
    assert mean == pytest.approx(np.where(answered, f1, ~has_answer).mean())


def test_questions_of_equal_scores_are_answered_together() -> None:
    no_answer, has_answer = np.array([-3.0, -3.0, -1.0]), np.array([True, False, True])
    threshold, mean = best_threshold(no_answer, np.array([1.0, 0.0, 1.0]), has_answer)
    # Any from -1 on is as good.
    assert [threshold, mean] == pytest.approx([0.0, 2 / 3])


def test_of_equally_good_thresholds_the_one_nearest_to_0_is_taken() -> None:
    has_answer = np.array([True, True, False])
    f1 = has_answer.astype(float)
    assert best_threshold(np.array([-7.0, -5.0, 6.0]), f1, has_answer) == (0.0, 1.0)
    assert best_threshold(np.array([1.0, 2.0, 6.0]), f1, has_answer) == (2.0, 1.0)
    threshold, _ = best_threshold(np.array([-9.0, -8.0, -6.0]), f1, has_answer)
    assert -6.001 < threshold < -6.0


def test_it_may_be_best_to_answer_none_or_all() -> None:
    no_answer = np.array([-5.0, 2.0])
    threshold, mean = best_threshold(no_answer, np.zeros(2), np.array([False, False]))
    assert threshold < -5.0 and np.isfinite(threshold) and mean == 1.0
    threshold, mean = best_threshold(no_answer, np.ones(2), np.array([True, True]))
    assert (threshold, mean) == (2.0, 1.0)


def test_rouge_is_that_of_the_official_package() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    found = rouge_figures(ANSWERS, REFERENCES)
    for row, answer, references in zip(found, ANSWERS, REFERENCES, strict=True):
        scores = [scorer.score(reference, answer) for reference in references]
        expected = [max(one[name].fmeasure for one in scores) for name in ROUGE_COLUMNS]
        assert row == pytest.approx(expected)
    # "foxes" and "jumped" are stemmed; of 12 and 11 words 8 are shared.
    assert found[0, 0] == pytest.approx(2 * 8 / (12 + 11))


def test_counts_of_chrf_give_the_corpus_score() -> None:
    counts = chrf_figures(ANSWERS, REFERENCES)
    space = LabelSpace(None, columns=CHRF_COLUMNS)
    streams = [[one[min(place, len(one) - 1)] for one in REFERENCES] for place in (0, 1)]
    for chosen in ([0, 1, 2, 3], [0, 0, 3], [1], [2, 3, 3]):
        expected = CHRF().corpus_score(
            [ANSWERS[i] for i in chosen], [[stream[i] for i in chosen] for stream in streams]
        )
        found = compute_metrics(["chrf"], counts[chosen], np.zeros(len(chosen)), space)["chrf"]
        assert 100 * found == pytest.approx(expected.score)
