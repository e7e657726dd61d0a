"""A question's context, cut into windows that overlap and that a model can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_dist.errors import DataError

OWN_COLUMNS = ("is_context", "char_start", "char_end")
"""What is kept of each token: whether it is one of the context, and its characters there."""
TOKEN_COLUMNS = ("input_ids", "token_type_ids", *OWN_COLUMNS)
_SHOWN = 60
Window = tuple[int, int]
"""From where to where among the tokens of the whole."""


@dataclass(frozen=True)
class Whole:
    """A question with its context, not cut yet.

    Args:
        columns: `TOKEN_COLUMNS`, lists as long as the tokens; empty where there is none.
        question: its text, for errors.
        first: where the context begins.
        last: its last token.
    """

    columns: Mapping[str, list[int]]
    question: str
    first: int
    last: int

    @classmethod
    def of(cls, tokens: Mapping[str, list[int]], question: str) -> Whole:
        """Find the context among a row's tokens (`tokenise` with offsets).

        A context without tokens is a DataError.
        """
        is_context = [int(text == 1) for text in tokens["text"]]
        if not any(is_context):
            raise DataError(
                f"the context of {_short(question)!r} gives no tokens",
                remedy="mend or drop the question",
            )
        columns = {
            "input_ids": tokens["input_ids"],
            "token_type_ids": tokens.get("token_type_ids", []),
            "is_context": is_context,
            "char_start": tokens["start"],
            "char_end": tokens["end"],
        }
        first = is_context.index(1)
        return cls(columns, question, first, first + sum(is_context) - 1)

    def windows(self, max_length: int, stride: int) -> Iterator[Window]:
        """Say from where to where each window goes, as fast tokenizers cut a second text.

        Args:
            max_length: tokens of question, window and special tokens together.
            stride: tokens that a window shares with the next one.

        Yields:
            Windows, the last of which ends with the context.

        Raises:
            DataError: if the question leaves too little room.
        """
        num_context = self.last - self.first + 1
        num_others = len(self.columns["input_ids"]) - num_context
        room = max_length - num_others
        if num_context > room <= stride:
            raise DataError(
                f"the question {_short(self.question)!r} has {num_others} tokens with the special "
                f"ones, and leaves {max(0, room)} of model.max_length={max_length} for its "
                f"context, whose windows overlap by data.stride={stride}",
                remedy="raise model.max_length, lower data.stride, or drop the question",
            )
        start = 0
        while True:
            end = min(start + room, num_context)
            yield self.first + start, self.first + end
            if end == num_context:
                return
            start = end - stride

    def cut(self, name: str, window: Window) -> list[int]:
        """The part of a column that goes with a window: the question is in each."""
        column = self.columns[name]
        return column[: self.first] + column[slice(*window)] + column[self.last + 1 :]

    def label(self, answer: Mapping[str, Any] | None, window: Window) -> tuple[int, int]:
        """Find an answer's first and last token in a window.

        Both are 0, the first token of all, where there is no answer or it is not whole there.
        """
        if answer is None:
            return 0, 0
        # Blanks around an answer belong to no token of it.
        text = answer["text"]
        start = answer["answer_start"] + len(text) - len(text.lstrip())
        end = start + len(text.strip())
        starts = self.columns["char_start"][slice(*window)]
        ends = self.columns["char_end"][slice(*window)]
        if starts[0] > start or ends[-1] < end:
            return 0, 0
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(ends, end, side="left"))
        # A token that stands for a word's beginning may claim the same character as the next one.
        return self.first + first, self.first + max(first, last)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
