from __future__ import annotations

import pytest

from moe_dist.data.normalisation import normalise, split_characters


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Film, it's GOOD!!", "the film it s good"),
        ("这本书，好0号。", "这本 本书 书好 0 号"),
        ("你", "你"),
        ("ｶﾀｶﾅ", "カタ タカ カナ"),
        ("iPhone手机", "iphone 手机"),
        ("नमस्ते दुनिया", "नमस्ते दुनिया"),
        ("Vie\u0323\u0302t", "việt"),
        ("كَتَبَ", "كَتَبَ"),
        ("ดีมาก อร่อย", "ดีมาก มากอ ากอร่ กอร่อ อร่อย"),
        ("ភាសា\u200bខ្មែរ", "ភាសាខ្មែ សាខ្មែរ"),
        ("한국어 좋아요", "한국어 좋아요"),
        ("😭😡 👎!", "😭😡👎"),
        ("good ❤️", "good ❤"),
        ("?! ..", "?!.."),
        ("", ""),
    ],
)
def test_normalise(text: str, words: str) -> None:
    assert normalise(text) == words


def test_marks_and_symbols_tell_texts_apart() -> None:
    texts = ["की", "का", "ma\u0301", "mà", "😂", "😭", ":)", ":(", "ok 😂", "ok 😭", "!", "?"]
    assert len({normalise(text) for text in texts}) == len(texts)


def test_split_characters() -> None:
    assert split_characters("a 这本book. ก็") == ["a", "这", "本", "book.", "ก็"]
