"""How near a text is to the one that was wanted: figures of one sample, as official scorers count.

ROUGE and chrF are rouge-score's and sacrebleu's; exact match and F1 are SQuAD's
(`evaluate-v1.1.py`, arXiv:1606.05250).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

CHRF_ORDER = 6
CHRF_COLUMNS = tuple(
    f"chrf_{what}_{order}"
    for order in range(1, CHRF_ORDER + 1)
    for what in ("hypothesis", "reference", "match")
)
"""Counts of character n-grams by their length: in the answer, in the reference, and in both."""
ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def rouge(text: str, reference: str) -> tuple[float, ...]:
    """F-measures of `ROUGES`, on words without their endings; lines are rougeLsum's sentences."""
    found = _rouge_scorer().score(reference, text)
    return tuple(float(found[name].fmeasure) for name in ROUGES)


def chrf_counts(text: str, reference: str) -> list[int]:
    """Counts in the order of `CHRF_COLUMNS`, which add up over samples."""
    scorer = _chrf_scorer()
    counts: list[int] = scorer._extract_corpus_statistics([text], [[reference]])[0]
    return counts


def normalise_answer(text: str) -> str:
    """Drop case, punctuation, articles and blanks, as SQuAD's scorer does."""
    bare = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(text: str, references: Sequence[str]) -> float:
    """1 where the text is one of the references, both normalised."""
    return float(normalise_answer(text) in map(normalise_answer, references))


def f1(text: str, references: Sequence[str]) -> float:
    """F1 of the words that text and reference share; of several references the best."""
    return max(_shared_words(text, reference) for reference in references)


def _shared_words(text: str, reference: str) -> float:
    said, wanted = normalise_answer(text).split(), normalise_answer(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    num_shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * num_shared / (len(said) + len(wanted))


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGES), use_stemmer=True)


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(char_order=CHRF_ORDER)
