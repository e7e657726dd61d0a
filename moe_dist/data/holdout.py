"""Withhold whole sentences from the training rows, so that recipes can be chosen on them.

Where the rows are phrases of the same sentences, as in SST-2, a row that is withheld alone is
still seen in training: in the phrases inside it, or in the sentence around it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from moe_dist.data.copies import near_copies
from moe_dist.data.normalisation import normalise, split_characters
from moe_dist.errors import DataError

Tokens = tuple[str, ...]


def withhold(
    rows: Sequence[tuple[str, str | None]], num_samples: int, *, seed: int
) -> tuple[list[int], list[int]]:
    """Draw whole sentences, and drop from the rest what says the same.

    Texts are compared as sequences of words between white space, case folded; where a script sets
    none, of characters. A row of a single
    text is withheld only if it lies in no longer text of another row; then every row is dropped
    from the rest that equals it or lies in it. Of pairs any row may be withheld, and rows are
    dropped that share one of its texts. Near copies are dropped as well, as from a dev set.

    The order of drawing is a hash of seed and text, so it depends neither on the order of the rows
    nor on a library's random numbers.

    Args:
        rows: the text of each row, and its second one where rows are pairs.
        num_samples: rows to withhold.
        seed: fixes the draw.

    Returns:
        Row numbers for train and hold-out, each ascending.

    Raises:
        DataError: if there are not so many whole sentences, or no row would be left to train on.
    """
    tokens = [tuple(_tokens(text) for text in row if text is not None) for row in rows]
    is_pair = any(len(parts) > 1 for parts in tokens)
    nested = None if is_pair else Nested(parts[0] for parts in tokens)
    inner = set() if nested is None else nested.inner
    first_rows: dict[tuple[Tokens, ...], int] = {}
    for row, parts in enumerate(tokens):
        if parts[0] and parts[0] not in inner:
            first_rows.setdefault(parts, row)
    if num_samples > len(first_rows):
        what = "different pairs" if is_pair else "training rows that lie in no other row"
        raise DataError(
            f"data.holdout_samples={num_samples} is more than the {len(first_rows)} {what}",
            remedy="give a smaller number",
        )
    order = sorted(first_rows, key=lambda parts: (_draw(seed, parts), first_rows[parts]))
    held = order[:num_samples]
    same = {text for parts in held for text in parts}
    if nested is not None:
        same.update(text for parts in held for text in nested.inside(parts[0]))
    rest = [row for row, parts in enumerate(tokens) if same.isdisjoint(parts)]
    holdout = sorted(first_rows[parts] for parts in held)
    near = near_copies([_words(rows[row]) for row in rest], [_words(rows[row]) for row in holdout])
    train = [row for position, row in enumerate(rest) if position not in near]
    if not train:
        raise DataError(
            f"data.holdout_samples={num_samples} leaves no training row that shares no text with "
            "those withheld",
            remedy="give a smaller number",
        )
    return train, holdout


class Nested:
    """Finds the texts that lie in others, in one walk over all of them.

    Args:
        texts: sequences of words; equal ones count once.
    """

    def __init__(self, texts: Iterable[Tokens]) -> None:
        self._texts: dict[int, list[Tokens]] = {}
        # A walk goes on only while some text begins so: most end after a word or two.
        self._beginnings: set[int] = set()
        distinct = dict.fromkeys(texts)
        for text in distinct:
            digest = 0
            for word in text:
                digest = hash((digest, word))
                self._beginnings.add(digest)
            self._texts.setdefault(digest, []).append(text)
        self.inner: set[Tokens] = set()
        """Those that lie in a longer one."""
        for text in distinct:
            self.inner.update(self.inside(text))

    def inside(self, text: Tokens) -> Iterator[Tokens]:
        """List each shorter text that lies in one as a run of its words, as often as it does."""
        for start in range(len(text)):
            digest = 0
            for end in range(start + 1, len(text) + 1):
                digest = hash((digest, text[end - 1]))
                if digest not in self._beginnings:
                    break
                for found in self._texts.get(digest, ()):
                    if len(found) < len(text) and found == text[start:end]:
                        yield found


def _tokens(text: str) -> Tokens:
    return tuple(split_characters(unicodedata.normalize("NFKC", text).casefold()))


def _words(row: tuple[str, str | None]) -> str:
    return normalise(" ".join(text for text in row if text is not None))


def _draw(seed: int, parts: tuple[Tokens, ...]) -> bytes:
    text = "\n".join(" ".join(words) for words in parts)
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()
