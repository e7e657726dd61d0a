from __future__ import annotations

import random

import pytest

from moe_dist.data.holdout import Nested, withhold
from moe_dist.errors import DataError

Row = tuple[str, str | None]


def lies_in(inner: str, outer: str) -> bool:
    """The slow oracle: a run of the other's words, case folded."""
    few, many = inner.casefold().split(), outer.casefold().split()
    return any(many[i : i + len(few)] == few for i in range(len(many) - len(few) + 1))


def phrases(num_sentences: int, *, words: int = 400, seed: int = 0) -> list[Row]:
    """Sentences and some of their phrases, as SST-2 has them, shuffled."""
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(words)]
    texts = []
    for _ in range(num_sentences):
        sentence = rng.choices(vocabulary, k=rng.randint(3, 12))
        texts.append(" ".join(sentence))
        for _ in range(4):
            start = rng.randrange(len(sentence))
            texts.append(" ".join(sentence[start : start + rng.randint(1, 8)]))
    rng.shuffle(texts)
    return [(text.upper() if rng.random() < 0.1 else text, None) for text in texts]


def test_sentences_are_withheld_with_all_that_shares_them() -> None:
    rows = phrases(120)
    train, holdout = withhold(rows, 25, seed=1)
    assert len(holdout) == 25 and train == sorted(train) and holdout == sorted(holdout)
    texts = [text for text, _ in rows]
    for row in holdout:
        longer = [t for t in texts if len(t.split()) > len(texts[row].split())]
        assert not any(lies_in(texts[row], other) for other in longer)
        for other in train:
            assert not lies_in(texts[row], texts[other])
            assert not lies_in(texts[other], texts[row])
    # Nothing else is lost: few of these random sentences are near copies of another.
    shared = [
        row
        for row in range(len(rows))
        if any(
            lies_in(texts[row], texts[held]) or lies_in(texts[held], texts[row]) for held in holdout
        )
    ]
    assert len(rows) - len(train) - len(shared) <= 3


def test_the_draw_follows_the_seed_and_not_the_order() -> None:
    rows = phrases(60)
    held = {rows[row][0].casefold() for row in withhold(rows, 20, seed=3)[1]}
    turned = list(reversed(rows))
    assert {turned[row][0].casefold() for row in withhold(turned, 20, seed=3)[1]} == held
    assert {rows[row][0].casefold() for row in withhold(rows, 20, seed=4)[1]} != held


def test_pairs_share_a_text_or_not() -> None:
    rng = random.Random(0)
    left = [f"what is {i} of the {rng.random()}" for i in range(30)]
    right = [f"an answer {i} about {rng.random()}" for i in range(30)]
    rows: list[Row] = [(rng.choice(left), rng.choice(right)) for _ in range(60)]
    train, holdout = withhold(rows, 6, seed=0)
    assert len(holdout) == 6 and train
    held = {text for row in holdout for text in rows[row]}
    assert not any(text in held for row in train for text in rows[row])


def test_a_text_of_one_side_is_found_on_the_other() -> None:
    rows: list[Row] = [("a b", "c d"), ("c d", "e f"), ("g h", "i j"), ("k l", "m n")]
    for seed in range(8):
        train, holdout = withhold(rows, 1, seed=seed)
        held = {text for row in holdout for text in rows[row]}
        assert not any(text in held for row in train for text in rows[row])


def test_too_many_rows_are_refused_with_the_number_there_is() -> None:
    rows: list[Row] = [("a fine film", None), ("fine film", None), ("a dull one", None)]
    with pytest.raises(
        DataError, match="is more than the 2 training rows that lie in no other row"
    ):
        withhold(rows, 3, seed=0)
    with pytest.raises(DataError, match="leaves no training row"):
        withhold(rows, 2, seed=0)
    with pytest.raises(DataError, match="is more than the 1 different pairs"):
        withhold([("a", "b")], 2, seed=0)


def test_phrases_without_spaces_leave_with_their_sentence() -> None:
    rows: list[Row] = [
        ("这家餐厅的服务非常好下次还来", None),
        ("服务非常好", None),
        ("很糟糕", None),
    ]
    rows += [("😂😂", None), ("😭", None)]
    for seed in range(8):
        train, holdout = withhold(rows, 1, seed=seed)
        assert train and 1 not in holdout
        if 0 in holdout:
            assert train == [2, 3, 4]


def test_nested_texts_agree_with_comparing_all_pairs() -> None:
    rng = random.Random(5)
    texts = [tuple(rng.choices("abc", k=rng.randint(0, 6))) for _ in range(120)]
    nested = Nested(texts)

    def within(inner: tuple[str, ...], outer: tuple[str, ...]) -> bool:
        return len(inner) < len(outer) and lies_in(" ".join(inner), " ".join(outer))

    expected = {t for t in texts if t and any(within(t, other) for other in texts)}
    assert nested.inner == expected


def test_many_rows_take_seconds() -> None:
    rows = phrases(4000, words=3000)
    train, holdout = withhold(rows, 300, seed=0)
    assert len(rows) == 20_000 and len(holdout) == 300 and len(train) > 10_000
