from __future__ import annotations

import random

import pytest

from moe_dist.data.splits import hold_out, near_copies, normalise
from moe_dist.errors import DataError

FILM = "the gorgeously elaborate continuation of the trilogy is so huge that a column cannot do"


def texts(num: int) -> list[str]:
    rng = random.Random(0)
    words = [f"word{i}" for i in range(300)]
    return [" ".join(rng.choices(words, k=10)) for _ in range(num)]


@pytest.mark.parametrize(
    ("text", "is_near"),
    [
        (FILM, True),
        (FILM.upper() + " !!", True),
        (FILM.replace("huge", "large"), True),
        (FILM + " it justice at all", True),
        (" ".join(FILM.split()[3:10]), True),
        (" ".join(reversed(FILM.split())), True),
        ("the continuation of the story is", False),
        ("a dull film without a story or an end that one could care about", False),
        ("", False),
    ],
)
def test_near_copies(text: str, is_near: bool) -> None:
    reference = normalise(FILM)
    assert near_copies([normalise(text)], [reference]) == ({0} if is_near else set())


def test_near_copies_agree_with_comparing_all_pairs() -> None:
    rng = random.Random(1)
    words = ["a", "b", "c", "d", "e", "f", "g", "h"]
    some = [" ".join(rng.choices(words, k=rng.randint(1, 7))) for _ in range(150)]
    references, others = some[:30], some[30:]

    def triples(text: str) -> set[tuple[str, ...]]:
        parts = text.split()
        return set(zip(parts, parts[1:], parts[2:], strict=False))

    def is_near(left: str, right: str) -> bool:
        shingles = triples(left), triples(right)
        bags = set(left.split()), set(right.split())
        shared, smaller = len(shingles[0] & shingles[1]), min(map(len, shingles))
        return (
            left == right
            or (shared > 0 and shared >= 0.5 * len(shingles[0] | shingles[1]))
            or (smaller >= 3 and shared >= 0.8 * smaller)
            or len(bags[0] & bags[1]) >= 0.75 * len(bags[0] | bags[1])
        )

    expected = {i for i, text in enumerate(others) if any(is_near(text, r) for r in references)}
    assert near_copies(others, references) == expected
    assert 0 < len(expected) < len(others)


def test_hold_out_depends_on_seed_and_text_only() -> None:
    rows = texts(200)
    train, dev = hold_out(rows, 50, seed=1)
    assert len(dev) == 50
    assert sorted(train + dev) == list(range(200))
    shuffled = list(reversed(rows))
    _, dev_again = hold_out(shuffled, 50, seed=1)
    assert {rows[i] for i in dev} == {shuffled[i] for i in dev_again}
    assert hold_out(rows, 50, seed=2)[1] != dev


def test_copies_of_dev_rows_leave_the_training_rows() -> None:
    rows = texts(100)
    with_copies = rows + [text.title() + "." for text in rows]
    train, dev = hold_out(with_copies, 40, seed=0)
    in_dev = {normalise(with_copies[i]) for i in dev}
    assert not in_dev & {normalise(with_copies[i]) for i in train}
    assert len(train) == 200 - 2 * len(in_dev)


def test_share_of_the_rows() -> None:
    assert len(hold_out(texts(200), 0.1, seed=0)[1]) == 20


@pytest.mark.parametrize("dev_size", [0, 200, 500, 0.001, -1])
def test_sizes_that_leave_a_side_empty(dev_size: float) -> None:
    with pytest.raises(DataError, match="cannot be held out of 200 rows"):
        hold_out(texts(200), dev_size, seed=0)


def test_rows_that_are_all_alike_cannot_be_split() -> None:
    with pytest.raises(DataError, match="near copy"):
        hold_out(["the same text everywhere"] * 10, 2, seed=0)
