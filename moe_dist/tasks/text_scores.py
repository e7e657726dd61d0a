"""Figures of answers in words: SQuAD's exact match and F1, ROUGE, and the counts of chrF.

Each function takes N answers, and for each its references; nothing is downloaded.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]

ANSWER_COLUMNS = ("exact", "f1")
ROUGE_COLUMNS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CHRF_ORDER = 6
CHRF_COLUMNS = tuple(
    f"chrf_{what}_{order}"
    for order in range(1, CHRF_ORDER + 1)
    for what in ("hypothesis", "reference", "match")
)
"""Counts of character n-grams by their length: in the answer, in the reference, and in both."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUNDING = 1e-9
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Drop case, punctuation, English articles and extra white space, as SQuAD's script does."""
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def answer_figures(answers: Sequence[str], gold: Sequence[Sequence[str]]) -> Figures:
    """Score answers to questions as SQuAD 2.0's script does.

    That of 1.1 differs only where nothing but punctuation and articles stands in an answer.

    Args:
        answers: one for each question, "" for "no answer".
        gold: the right answers of each question; none, or none that is more than punctuation and
            articles, where it has no answer.

    Returns:
        ANSWER_COLUMNS in [0, 1], (N, 2): of each the best over the right answers.
    """
    found = np.zeros((len(answers), 2))
    for row, (answer, right) in enumerate(zip(answers, gold, strict=True)):
        said = normalise_answer(answer)
        expected = [text for text in map(normalise_answer, right) if text] or [""]
        found[row] = said in expected, max(_token_f1(said, text) for text in expected)
    return found


def _token_f1(answer: str, gold: str) -> float:
    said, right = answer.split(), gold.split()
    if not said or not right:
        return float(said == right)
    num_same = sum((Counter(said) & Counter(right)).values())
    return 2 * num_same / (len(said) + len(right))


def best_threshold(
    no_answer_N: NDArray[np.floating], f1_N: NDArray[np.floating], has_answer_N: NDArray[np.bool_]
) -> tuple[float, float]:
    """Find from which no-answer score on questions are best left unanswered.

    As `find_best_thresh` of SQuAD 2.0's script, but questions of equal scores stay together, and
    scores may be of any range.

    Args:
        no_answer_N: how sure a model is that a question has no answer; any scale.
        f1_N: F1 of what it would answer, 0 where the question has no answer.
        has_answer_N: whether the question has one.

    Returns:
        The threshold (a question is answered if its score is not above it), and the mean F1 that
        it gives. Of equally good thresholds it is the one nearest to 0, which published code takes
        where none is looked for.
    """
    order = np.argsort(no_answer_N, kind="stable")
    scores = np.asarray(no_answer_N, np.float64)[order]
    is_none = ~np.asarray(has_answer_N, bool)[order]
    # Entry k: the k lowest scores are answered, with thresholds from lows[k] to highs[k].
    gains = np.asarray(f1_N, np.float64)[order] - is_none
    sums = np.sum(is_none) + np.append(0.0, np.cumsum(gains))
    lows = np.append(-np.inf, scores)
    highs = np.append(np.nextafter(scores, -np.inf), np.inf)
    sums = np.where(lows <= highs, sums, -np.inf)
    best = np.flatnonzero(sums >= sums.max() - _ROUNDING)
    nearest = np.clip(0.0, lows[best], highs[best])
    chosen = int(np.abs(nearest).argmin())
    return float(nearest[chosen]), float(sums[best[chosen]]) / len(scores)


def rouge_figures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """Score texts by ROUGE's F-measures, with the stemmer, as papers do.

    Only the letters a to z and digits count, as in the original: texts in other scripts score 0.
    ROUGE-Lsum takes lines for sentences.

    Args:
        answers: N texts.
        references: those of each; of several the best one counts, measure by measure.

    Returns:
        ROUGE_COLUMNS in [0, 1], (N, 4).
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE_COLUMNS), use_stemmer=True)
    found = np.zeros((len(answers), len(ROUGE_COLUMNS)))
    for row, (answer, expected) in enumerate(zip(answers, references, strict=True)):
        scores = scorer.score_multi(list(expected), answer)
        found[row] = [scores[name].fmeasure for name in ROUGE_COLUMNS]
    return found


def chrf_figures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """Count what chrF of any selection of texts is computed from, by sacrebleu's defaults.

    Args:
        answers: N texts.
        references: those of each; of several the one with the best chrF is counted.

    Returns:
        CHRF_COLUMNS, (N, 18).
    """
    from sacrebleu.metrics import CHRF

    scorer = CHRF()
    found = np.zeros((len(answers), len(CHRF_COLUMNS)))
    for row, (answer, expected) in enumerate(zip(answers, references, strict=True)):
        # Its public functions give scores of whole corpora alone.
        known = scorer._extract_reference_info(list(expected))
        found[row] = scorer._compute_segment_statistics(answer, known)
    return found
