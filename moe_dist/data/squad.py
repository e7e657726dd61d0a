"""SQuAD's own files, in which questions lie in paragraphs and these in articles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_dist.data.rows import Row
from moe_dist.errors import DataError

_SHAPE = (
    'give {"data": [{"paragraphs": [{"context": TEXT, "qas": [{"id": ID, "question": TEXT, '
    '"answers": [{"text": TEXT, "answer_start": NUMBER}]}]}]}]}'
)


def is_squad(value: Any) -> bool:
    """Whether a JSON value is laid out as SQuAD 1.1 and 2.0 are."""
    articles = value.get("data") if isinstance(value, dict) else None
    return (
        isinstance(articles, list)
        and bool(articles)
        and isinstance(articles[0], dict)
        and "paragraphs" in articles[0]
    )


def squad_rows(path: Path, value: Any) -> Iterator[Row]:
    """Give each question with its context, as rows of id, title, question, context and answers.

    Args:
        path: for errors.
        value: what `is_squad` says yes to.

    Yields:
        The question's number, from 1, and its columns; `plausible_answers` are none.

    Raises:
        DataError: if a part is missing, or a question that is marked as impossible has answers.
    """
    number = 0
    for place, article in enumerate(value["data"], start=1):
        where = f"{path}, article {place}"
        title = _part(article, "title", str, where, default="")
        paragraphs = _part(article, "paragraphs", list, where)
        for index, paragraph in enumerate(paragraphs, start=1):
            here = f"{where}, paragraph {index}"
            context = _part(paragraph, "context", str, here)
            for entry in _part(paragraph, "qas", list, here):
                number += 1
                name = entry.get("id") if isinstance(entry, dict) else None
                place_of_question = f"{path}, question {name or number}"
                # Questions that nobody answered yet have none, which labels are checked for.
                answers = _part(entry, "answers", list, place_of_question, default=())
                if answers and entry.get("is_impossible") is True:
                    raise DataError(
                        f"{place_of_question}: it is marked as impossible and has answers",
                        remedy="remove is_impossible, or move the answers to plausible_answers",
                    )
                yield (
                    number,
                    {
                        "id": name,
                        "title": title,
                        "question": _part(entry, "question", str, place_of_question),
                        "context": context,
                        "answers": None if answers == () else answers,
                    },
                )


def _part(value: Any, key: str, kind: type, where: str, default: Any = None) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    if found is None and default is not None:
        return default
    if not isinstance(found, kind):
        raise DataError(
            f"{where}: {key} is {'missing' if found is None else 'of another type'}", remedy=_SHAPE
        )
    return found
