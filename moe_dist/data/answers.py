"""Answers that are parts of a context: read, checked against it, and written as one text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moe_dist.data.labels import encodable
from moe_dist.data.rows import SourceRow
from moe_dist.errors import DataError

ID = "id"
_SHAPE = '{"text": ["Paris"], "answer_start": [12]}, with empty lists where there is no answer'
_SHOWN = 60
_ENCODINGS = (
    ("utf-8", 1, "bytes"),
    ("utf-16-le", 2, "units of UTF-16 (Java, JavaScript)"),
)


def answers_label(row: SourceRow, column: str, value: Any, question: str, context: str) -> str:
    """Bring the right answers to a question into one text, as `TaskKind.tokens` reads them.

    Args:
        row: the question's.
        column: where the answers are.
        value: as the hub's SQuAD has them, as SQuAD's files have them, or one of both as JSON.
        question: its text.
        context: where the answers must be.

    Returns:
        JSON: a list of objects with `text` and `answer_start`; empty where there is no answer.

    Raises:
        DataError: naming file and question, for a missing text, or an answer that is not where
            it is said to be.
    """
    for name, text in (("question", question), ("context", context)):
        if not text.strip():
            raise _error(row, f"the {name} is empty", "mend or drop the row")
    found = []
    for text, start in _pairs(row, column, value):
        encodable(row, column, text)
        if not text.strip():
            remedy = "a question without an answer has an empty list of them"
            raise _error(row, "an answer is empty", remedy)
        if context[start : start + len(text)] != text or start < 0:
            raise _misplaced(row, text, start, context)
        found.append({"text": text, "answer_start": start})
    return json.dumps(found, ensure_ascii=False)


def refuse_repeated_ids(rows: Sequence[SourceRow]) -> None:
    """Raise a DataError where two questions have one id; rows without ids pass."""
    seen: dict[Any, SourceRow] = {}
    for row in rows:
        name = row.values.get(ID)
        if name is None:
            continue
        other = seen.setdefault(str(name), row)
        if other is not row:
            raise _error(
                row,
                f"the same id stands at line {other.line} too",
                "give each question an id of its own, or drop the repeated one",
            )


def _error(row: SourceRow, what: str, remedy: str) -> DataError:
    name = row.values.get(ID)
    return row.error(f"question {name}: {what}" if name is not None else what, remedy)


def _pairs(row: SourceRow, column: str, value: Any) -> list[tuple[str, int]]:
    """Texts with where they start, checked for their types."""
    if value is None:
        raise _error(row, f"column {column!r} is missing", f"give {_SHAPE}")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            what = f"column {column!r} holds no answers: {value[:_SHOWN]!r}"
            raise _error(row, what, f"write JSON: {_SHAPE}") from None
    if isinstance(value, dict) and {"text", "answer_start"} <= set(value):
        texts, starts = value["text"], value["answer_start"]
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        texts = [one.get("text") for one in value]
        starts = [one.get("answer_start") for one in value]
    else:
        texts, starts = None, None
    fits = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not fits:
        what = f"column {column!r} holds no answers: {str(value)[:_SHOWN]!r}"
        raise _error(row, what, f"give {_SHAPE}")
    assert isinstance(texts, list) and isinstance(starts, list), "checked above"
    for text, start in zip(texts, starts, strict=True):
        is_number = isinstance(start, int) and not isinstance(start, bool)
        if not isinstance(text, str) or not is_number:
            what = f"an answer is no text with a whole number: {text!r} at {start!r}"
            raise _error(row, what, f"give {_SHAPE}")
    return list(zip(texts, starts, strict=True))


def _misplaced(row: SourceRow, text: str, start: int, context: str) -> DataError:
    """Say what is wrong with an answer's place, and what it looks like."""
    shown = repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…")
    if text not in context:
        return _error(
            row,
            f"the answer {shown} is not in its context",
            "answers must be parts of the context, letter by letter; for answers in other words "
            "use data.kind=seq2seq",
        )
    wrong = f"the answer {shown} does not start at character {start}"
    for encoding, size, units in _ENCODINGS:
        before = context.encode(encoding)[: size * max(0, start)].decode(encoding, "ignore")
        if context.startswith(text, len(before)) and len(before.encode(encoding)) == size * start:
            return _error(
                row,
                f"{wrong}, but after {start} {units}: starts look as if counted in {units}",
                f"count characters, as Python does: here it is {len(before)}",
            )
    for shift in (-1, 1):
        place = start + shift
        if place >= 0 and context[place : place + len(text)] == text:
            return _error(
                row,
                f"{wrong} but at {place}: starts look off by one",
                "count characters from 0"
                if shift < 0
                else "take the start in the context as it is",
            )
    places = [place for place in range(len(context)) if context.startswith(text, place)]
    nearest = min(places, key=lambda place: abs(place - start))
    return _error(
        row,
        f"{wrong}; the nearest place where it stands is {nearest}",
        "count characters from 0, in the context as it is, blanks and line ends included",
    )
