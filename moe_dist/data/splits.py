"""Hold a dev set out of the training rows, so that neither repeats the other."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from moe_dist.errors import DataError

_WORD = re.compile(r"[^\W_]+")
_SHINGLE_WORDS = 3
# Two texts count as near copies from these shares of common word triples (or words, where one
# of them is too short for triples) on. A nested text must have 5 words, 3 triples, to count.
_MIN_JACCARD = 0.5
_MIN_WORD_JACCARD = 0.75
_MIN_NESTED = 0.8
_MIN_NESTED_SHINGLES = 3


def normalise(text: str) -> str:
    """Lower-case words of a text, joined by single spaces, without punctuation.

    Args:
        text: any text.

    Returns:
        The words; texts with equal words are copies of each other.
    """
    return " ".join(_WORD.findall(text.lower()))


def hold_out(
    texts: Sequence[str], dev_size: int | float, *, seed: int
) -> tuple[list[int], list[int]]:
    """Draw a dev set and drop the near copies of its texts from the rest.

    The order of drawing is a hash of seed and normalised text, so it depends neither on the
    order of the rows nor on a library's random numbers.

    Args:
        texts: one text for each row (two sentences joined).
        dev_size: rows to hold out (int >= 1), or their share (float below 1).
        seed: fixes the draw.

    Returns:
        Row numbers for train and dev, each ascending.

    Raises:
        DataError: if no row would be left on one of the sides.
    """
    size = (
        round(dev_size * len(texts)) if isinstance(dev_size, float) and dev_size < 1 else dev_size
    )
    if not 1 <= size < len(texts):
        raise DataError(
            f"data.dev_size={dev_size} cannot be held out of {len(texts)} rows",
            remedy=f"give a number from 1 to {len(texts) - 1}, or a share between 0 and 1",
        )
    keys = [normalise(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda row: (_draw(seed, keys[row]), row))
    dev = sorted(order[: int(size)])
    rest = sorted(order[int(size) :])
    near = near_copies([keys[row] for row in rest], [keys[row] for row in dev])
    train = [row for position, row in enumerate(rest) if position not in near]
    if not train:
        raise DataError(
            "every training row is a near copy of a dev row",
            remedy="give data.dev a file of its own instead of data.dev_size",
        )
    return train, dev


def near_copies(texts: Sequence[str], references: Sequence[str]) -> set[int]:
    """Find the texts that repeat a reference, nearly repeat it, hold it or lie in it.

    Args:
        texts: normalised texts to examine.
        references: normalised texts to compare with.

    Returns:
        Positions in `texts`.
    """
    exact = set(references)
    by_shingle = _Index(_shingles(text) for text in references)
    by_word = _Index(_words(text) for text in references)
    found = set()
    for position, text in enumerate(texts):
        if (
            text in exact
            or by_shingle.has_near(_shingles(text), _MIN_JACCARD, nested=True)
            or by_word.has_near(_words(text), _MIN_WORD_JACCARD, nested=False)
        ):
            found.add(position)
    return found


class _Index:
    """Inverted index from features to the references that hold them."""

    def __init__(self, feature_sets: Iterable[frozenset[str]]) -> None:
        self._sets = list(feature_sets)
        self._holders: dict[str, list[int]] = defaultdict(list)
        for reference, features in enumerate(self._sets):
            for feature in features:
                self._holders[feature].append(reference)

    def has_near(self, features: frozenset[str], min_jaccard: float, *, nested: bool) -> bool:
        probes: Iterable[str] = features
        if not nested:
            # Two sets of this similarity share all but a few features, so a few rare ones of
            # these suffice to find every candidate, and common words need no look.
            num_probes = int((1.0 - min_jaccard) * len(features)) + 1
            probes = sorted(features, key=self._rarity)[:num_probes]
        candidates = {reference for probe in probes for reference in self._holders.get(probe, ())}
        for reference in candidates:
            other = self._sets[reference]
            shared = len(features & other)
            if shared >= min_jaccard * (len(features) + len(other) - shared):
                return True
            smaller = min(len(features), len(other))
            if nested and smaller >= _MIN_NESTED_SHINGLES and shared >= _MIN_NESTED * smaller:
                return True
        return False

    def _rarity(self, feature: str) -> tuple[int, str]:
        return len(self._holders.get(feature, ())), feature


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _shingles(text: str) -> frozenset[str]:
    words = text.split()
    return frozenset(
        " ".join(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1)
    )


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()
