"""Documents of plain text files, for tasks that read running text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from moe_dist.data.rows import Row, Say, SourceRow

Documents = Literal["file", "headings", "lines", "paragraphs"]
TEXT_SUFFIXES = (".txt", ".text", ".tokens")
TEXT = "text"
"""The column that a document becomes."""
_TOP_HEADING = re.compile(r" ?= [^=](.*[^=])? = ?")
"""` = Title = `, as WikiText has it; deeper headings have more of these signs."""


def read_documents(path: Path, lines: list[str], how: Documents | None, say: Say) -> Iterator[Row]:
    """Cut a text file into documents, without the empty lines around each.

    Args:
        path: names the file.
        lines: of the file.
        how: `file`: all of it is one; `headings`: a heading of the top level begins one, and what
            stands before the first is one too; `lines`: each line that is not empty; `paragraphs`:
            between empty lines. None: `headings` where the first line that is not empty is one,
            else `file`.
        say: is told how it was done, where nobody said it.

    Yields:
        Line number of its first line, and the text.
    """
    first = next((line for line in lines if line.strip()), "")
    if how is None:
        how = "headings" if _TOP_HEADING.fullmatch(first) else "file"
        meaning = (
            f"a document begins at each heading like {first.strip()!r}"
            if how == "headings"
            else "the whole file is one document"
        )
        say(f"{path.name}: {meaning} (data.documents={how})")
    start = 0
    for number in range(1, len(lines) + 1):
        if number == len(lines) or _begins(how, lines, number):
            end = number
            while start < end and not lines[start].strip():
                start += 1
            while start < end and not lines[end - 1].strip():
                end -= 1
            if start < end:
                yield start + 1, {TEXT: "\n".join(lines[start:end])}
            start = number


def join_rows(rows: list[SourceRow], column: str, how: Documents) -> list[SourceRow]:
    """Put a text together whose rows are its lines, and cut it into documents.

    Rows without the column are given back as they are, for who checks rows to name the fault.
    """
    if any(column not in row.values for row in rows):
        return rows
    lines = [str(row.values[column] or "").rstrip("\n") for row in rows]
    return [
        SourceRow(rows[0].origin, rows[line - 1].line, {column: values[TEXT]})
        for line, values in read_documents(rows[0].origin, lines, how, lambda said: None)
    ]


def _begins(how: Documents, lines: list[str], number: int) -> bool:
    """Whether a document begins at a line, whose number counts from 0."""
    if how == "headings":
        return bool(_TOP_HEADING.fullmatch(lines[number]))
    if how == "paragraphs":
        return not lines[number - 1].strip()
    return how == "lines"
