"""Hold a dev set out of the training rows, so that neither repeats the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from moe_dist.data.copies import near_copies
from moe_dist.data.normalisation import normalise
from moe_dist.errors import DataError


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
    size = _size(dev_size, len(texts))
    keys = [normalise(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda row: (_draw(seed, keys[row]), row))
    dev, rest = sorted(order[:size]), sorted(order[size:])
    near = near_copies([keys[row] for row in rest], [keys[row] for row in dev])
    train = [row for position, row in enumerate(rest) if position not in near]
    if not train:
        raise DataError(
            "every training row is a near copy of a dev row",
            remedy="give data.dev a file of its own instead of data.dev_size",
        )
    return train, dev


def hold_out_contexts(
    contexts: Sequence[str], dev_size: int | float, *, seed: int, key: str = "dev_size"
) -> tuple[list[int], list[int]]:
    """Draw whole contexts for a dev set, and drop those from the rest that nearly repeat one.

    Questions about one text know of each other. Contexts are drawn as rows are by `hold_out`, until
    these are as many as asked for, or a few more.

    Args:
        contexts: of each row.
        dev_size: rows to hold out (int >= 1), or their share (float below 1).
        seed: fixes the draw.
        key: of the recipe's data section, for errors.

    Returns:
        Row numbers for train and dev, each ascending.

    Raises:
        DataError: if no row would be left on one of the sides.
    """
    size = _size(dev_size, len(contexts), key)
    by_context: dict[str, list[int]] = {}
    for row, context in enumerate(contexts):
        by_context.setdefault(normalise(context), []).append(row)
    order = sorted(by_context, key=lambda key: _draw(seed, key))
    ends = list(accumulate(len(by_context[key]) for key in order))
    num_held = 1 + sum(end < size for end in ends)
    held, rest = order[:num_held], order[num_held:]
    if not rest:
        raise DataError(
            f"data.{key}={dev_size} takes all {len(order)} contexts, which are held out whole",
            remedy="give a smaller number",
        )
    near = near_copies(rest, held)
    kept = [key for position, key in enumerate(rest) if position not in near]
    if not kept:
        raise DataError(
            f"every other context is a near copy of one that data.{key}={dev_size} holds out",
            remedy="give a smaller number, or data with other contexts",
        )
    train, dev = (sorted(row for key in keys for row in by_context[key]) for keys in (kept, held))
    return train, dev


def _size(dev_size: int | float, num_rows: int, key: str = "dev_size") -> int:
    is_share = isinstance(dev_size, float) and dev_size < 1
    size = round(dev_size * num_rows) if is_share else int(dev_size)
    if not 1 <= size < num_rows:
        raise DataError(
            f"data.{key}={dev_size} cannot be held out of {num_rows} rows",
            remedy=f"give a number from 1 to {num_rows - 1}, or a share between 0 and 1",
        )
    return size


@dataclass(frozen=True)
class Repeats:
    """Rows that say what other rows say.

    Attributes:
        exact: rows whose words are those of another, ascending.
        near: further ones that are near copies, ascending.
    """

    exact: list[int]
    near: list[int]


def find_repeats(texts: Sequence[str], references: Sequence[str]) -> Repeats:
    """Find the texts that repeat a reference, such as dev rows that are training rows."""
    keys, others = ([normalise(text) for text in side] for side in (texts, references))
    exact = exact_copies(keys, others)
    return Repeats(sorted(exact), sorted(near_copies(keys, others) - exact))


def exact_copies(texts: Sequence[str], references: Sequence[str]) -> set[int]:
    """Positions of the normalised texts that equal a normalised reference."""
    known = set(references)
    return {row for row, text in enumerate(texts) if text in known}


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()
