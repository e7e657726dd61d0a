from __future__ import annotations

import random
import time

import pytest

from moe_dist.data import copies
from moe_dist.data.copies import near_copies
from moe_dist.data.normalisation import normalise
from moe_dist.data.splits import exact_copies, find_repeats, hold_out
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


def slow_near_copies(texts: list[str], references: list[str]) -> set[int]:
    """The slow oracle: compares all pairs."""

    def triples(text: str) -> set[tuple[str, ...]]:
        parts = text.split()
        return set(zip(parts, parts[1:], parts[2:], strict=False))

    def is_near(left: str, right: str) -> bool:
        shingles = triples(left), triples(right)
        bags = set(left.split()), set(right.split())
        shared, smaller = len(shingles[0] & shingles[1]), min(map(len, shingles))
        common = len(bags[0] & bags[1])
        return (
            left == right
            or (shared > 0 and shared >= 0.5 * len(shingles[0] | shingles[1]))
            or (smaller >= 3 and shared >= 0.8 * smaller)
            or (common > 0 and common >= 0.75 * len(bags[0] | bags[1]))
        )

    return {i for i, text in enumerate(texts) if any(is_near(text, r) for r in references)}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("block", [50, 2_000_000])
def test_near_copies_agree_with_comparing_all_pairs(
    seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_BLOCK", block)
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(rng.choice([8, 40, 400]))]
    longest = rng.choice([7, 7, 30])
    some = [" ".join(rng.choices(words, k=rng.randint(0, longest))) for _ in range(150)]
    for _ in range(60):  # Texts of others: cut, joined, and with words changed.
        left, right = (rng.choice(some).split() for _ in range(2))
        parts = left[rng.randrange(4) :] + right[: rng.choice([0, 0, 1, 3])]
        changed = [rng.choice(words) if rng.random() < 0.1 else word for word in parts]
        some.append(" ".join(changed))
    rng.shuffle(some)
    references, others = some[:60], some[60:]
    expected = slow_near_copies(others, references)
    assert near_copies(others, references) == expected
    assert 0 < len(expected) < len(others)


TWICE = {
    "chinese": (
        "这家餐厅的服务那天的菜很一般环境还可以价格有点贵下次不会再来朋友推荐特别好",
        "，真的！",
    ),
    "japanese": (
        "このレストランの料理はとても美味しかったですまた行きたいと思いますサービス",
        "、本当に！",
    ),
    "thai": ("ร้านอาหารนี้อร่อยมากและบริการดีเยี่ยมราคาไม่แพงจะกลับมาอีกแน่นอนครับ", " จริงๆ!"),
    "khmer": ("ភោជនីយដ្ឋាននេះមានម្ហូបឆ្ងាញ់ណាស់ហើយសេវាកម្មក៏ល្អដែរខ្ញុំនឹងត្រឡប់មកវិញ", " ពិតមែន!"),
    "burmese": ("ဒီစားသောက်ဆိုင်ကအစားအစာတွေအရမ်းကောင်းပြီးဝန်ဆောင်မှုလည်းကောင်းပါတယ်", " တကယ်!"),
}


@pytest.mark.parametrize("script", TWICE)
def test_twins_of_scripts_without_spaces(script: str) -> None:
    alphabet, suffix = TWICE[script]
    rng = random.Random(0)
    once = ["".join(rng.choices(alphabet, k=30)) for _ in range(100)]
    train, dev = hold_out(once + [text + suffix for text in once], 20, seed=0)
    assert not {row % 100 for row in train} & {row % 100 for row in dev}
    assert len(train) >= 150


def test_unrelated_texts_without_spaces_are_no_copies() -> None:
    left = normalise("这家餐厅的服务非常好，下次还会再来。")
    right = normalise("那部电影的故事太长了，看得我睡着了。")
    assert near_copies([left], [right]) == set()


@pytest.mark.parametrize(
    "marks", ["😀😃😄😁😆😅", ":;=-()", "★☆"], ids=["emoji", "punctuation", "symbols"]
)
@pytest.mark.parametrize("before", ["", "ok "])
def test_texts_without_words_are_compared_as_they_are(marks: str, before: str) -> None:
    if before and marks.isascii():
        pytest.skip("punctuation beside words says nothing")
    rng = random.Random(0)
    rows = [before + "".join(rng.choices(marks, k=rng.randint(1, 8))) for _ in range(200)]
    train, dev = hold_out(rows, 20, seed=0)
    held = {rows[row] for row in dev}
    kept = [row for row in range(200) if row not in dev and rows[row] not in held]
    assert train == kept and len(train) > 50


@pytest.mark.parametrize(
    "shared",
    [
        "这家餐厅的服务态度非常好我们全家都很满意下次还会再来",
        "please say whether the writer of the following review was content or not : ",
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_a_long_part_that_all_texts_share_makes_no_copies(shared: str, is_last: bool) -> None:
    own = [f"{a} {b}" for a in "甲乙丙丁戊己" for b in ["red", "green", "blue", "black", "white"]]
    rows = [f"{text} {shared}" if is_last else f"{shared} {text}" for text in own]
    train, dev = hold_out(rows, 3, seed=0)
    assert len(train) == 27 and len(dev) == 3
    # What is left is compared as ever.
    twice = rows + [f"{row} !" for row in rows]
    train, dev = hold_out(twice, 6, seed=0)
    assert not {row % 30 for row in train} & {row % 30 for row in dev} and train


def test_many_rows_take_seconds() -> None:
    rng = random.Random(0)
    foot = " ".join(f"sign{i}" for i in range(24))
    rows = [" ".join(f"w{rng.randrange(20_000)}" for _ in range(30)) for _ in range(20_000)]
    started_s = time.process_time()
    train, _ = hold_out([f"{row} {foot}" for row in rows], 2000, seed=0)
    assert len(train) == 18_000
    assert time.process_time() - started_s < 30  # It was two minutes.


def test_templates_of_few_rows_each_take_seconds() -> None:
    rng = random.Random(0)
    rows = [
        " ".join(f"w{rng.randrange(9999)}" for _ in range(14))
        + " "
        + " ".join(f"s{i % 10}x{place}" for place in range(22))
        for i in range(10_000)
    ]
    started_s = time.process_time()
    train, _ = hold_out(rows, 1000, seed=0)
    assert time.process_time() - started_s < 30 and train


def test_a_long_search_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies, "_SILENT_S", 0.0)
    with caplog.at_level("INFO", logger="moe_dist"):
        near_copies(["a b c d"], ["e f g h"])
    assert "1 rows are compared with 1 for near copies" in caplog.text


def test_repeats() -> None:
    train = ["A fine film, that one could see again and again.", "dull", "😂"]
    dev = ["dull!", "other words", "A fine film that one could see again and again today", "😭"]
    assert find_repeats(dev, train).exact == [0]
    assert find_repeats(dev, train).near == [2]
    assert exact_copies(["a", "b"], ["b"]) == {1}


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
