"""Bring texts into a form in which copies are equal, whatever their script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from operator import itemgetter

import regex

# Scripts that set no spaces between words, with the number of characters that stand in for one
# word: about as many as make a word there.
_SPACELESS = {
    "ideographs": (2, r"\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}"),
    "abugidas": (
        4,
        r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Tham}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Viet}"
        r"\p{Javanese}\p{Balinese}",
    ),
}
_ASCII_WORD = re.compile("[a-z0-9]+")
_SYMBOLS = r"\p{So}\p{Emoji_Modifier}"


def normalise(text: str) -> str:
    """Lower-case words of a text, joined by single spaces, without punctuation.

    Where a script sets no spaces, the overlapping runs of a few characters stand for words. Emoji
    and other symbols without words between them count as one word. A text of neither words nor
    symbols is taken as it is, without its white space.
    """
    if text.isascii():  # Most texts; this takes a tenth of the time.
        return " ".join(_ASCII_WORD.findall(text.lower())) or "".join(text.split())
    text = unicodedata.normalize("NFKC", text).lower()
    patterns = _patterns()
    if patterns.wordless.search(text) is None:
        words = patterns.words.findall(text)
    else:
        words = list(_all_words(text, patterns.pieces))
    return " ".join(words) or "".join(text.split())


def split_characters(text: str) -> list[str]:
    """Split a text at white space, and between characters of scripts that set none."""
    if text.isascii():
        return text.split()
    return _patterns().character.sub(r" \g<0> ", text).split()


def _all_words(text: str, pieces: regex.Pattern[str]) -> Iterator[str]:
    found = ((match.lastgroup, match[0]) for match in pieces.finditer(text))
    for kind, group in groupby(found, key=itemgetter(0)):
        parts = [piece for _, piece in group]
        if kind in _SPACELESS:
            characters = split_characters("".join(parts))
            length = _SPACELESS[kind][0]
            for start in range(max(1, len(characters) - length + 1)):
                yield "".join(characters[start : start + length])
        elif kind == "symbols":
            yield "".join(parts)
        else:
            yield from parts


@dataclass(frozen=True)
class _Patterns:
    words: regex.Pattern[str]
    """Words between spaces."""
    wordless: regex.Pattern[str]
    """What may not be split into such words."""
    pieces: regex.Pattern[str]
    """All kinds, each as a group of its name."""
    character: regex.Pattern[str]
    """One character, with its marks, of a script without spaces."""


@cache
def _patterns() -> _Patterns:
    # A mark belongs to its letter; variation selectors, which are marks too, show nothing.
    marks = r"[\p{M}--\p{Default_Ignorable_Code_Point}]*"
    spaceless = "".join(scripts for _, scripts in _SPACELESS.values())
    letter = rf"[[\p{{L}}\p{{N}}]--[{spaceless}]]"
    kinds = {"words": rf"(?:{letter}{marks})+", "symbols": rf"[{_SYMBOLS}]+"}
    for kind, (_, scripts) in _SPACELESS.items():
        kinds[kind] = rf"(?:[[\p{{L}}\p{{N}}]&&[{scripts}]]{marks})+"
    return _Patterns(
        words=_compile(kinds["words"]),
        wordless=_compile(rf"[{spaceless}{_SYMBOLS}]"),
        pieces=_compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in kinds.items())),
        character=_compile(rf"[[\p{{L}}\p{{N}}]&&[{spaceless}]]{marks}"),
    )


def _compile(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, flags=regex.VERSION1)
