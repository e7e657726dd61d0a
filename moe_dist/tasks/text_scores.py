"""How near a text is to those that are right, by the words of both."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower the case and drop punctuation, articles and further blanks.

    Source: SQuAD's evaluation script, arXiv:1606.05250.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def score_answer(answer: str, right: Sequence[str]) -> tuple[float, float]:
    """Compare an answer with the right ones; none of them, or an empty one, means no answer.

    Args:
        answer: the text; empty for none.
        right: texts of which any will do.

    Returns:
        Exact match and F1 of words with the right answer that fits best, each in [0, 1].

    Source: SQuAD 2.0's evaluation script, arXiv:1806.03822.
    """
    said = normalise_answer(answer)
    golds = [gold for gold in map(normalise_answer, right) if gold] or [""]
    return float(said in golds), max(_word_f1(said.split(), gold.split()) for gold in golds)


def _word_f1(said: Sequence[str], gold: Sequence[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    shared = (Counter(said) & Counter(gold)).total()
    return 2 * shared / (len(said) + len(gold))
