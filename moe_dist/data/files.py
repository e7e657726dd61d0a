"""Read rows from TSV, CSV, JSON and Parquet, and name file and line of every fault."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.data.content import (
    COMPRESSION_SUFFIXES,
    PARQUET_MAGIC,
    foreign_format,
    read_content,
    text_lines,
)
from moe_dist.data.delimited import read_csv, read_tsv
from moe_dist.data.documents import TEXT_SUFFIXES, Documents, read_documents
from moe_dist.data.rows import Row, Say, SourceRow, row_error
from moe_dist.data.squad import is_squad, squad_rows
from moe_dist.errors import DataError

__all__ = ["Row", "read_place", "read_rows", "row_error"]

_PARQUET = ".parquet"
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_SHOWN_CHARACTERS = 40
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_SPLIT_NAME = re.compile(r"(train|dev|valid|test|eval)[a-z]*(?=[-_.]|$)")


@dataclass(frozen=True)
class Texts:
    """Text files hold running text and no table.

    Attributes:
        documents: how documents are told apart; see `read_documents`.
    """

    documents: Documents | None = None


def _ignore(line: str) -> None:
    """Say nothing."""


def read_place(
    path: Path,
    column_names: Sequence[str] | None = None,
    say: Say = _ignore,
    texts: Texts | None = None,
) -> list[SourceRow]:
    """Read a data file, or all parts of a directory as Spark, Dask and others write them.

    Names that begin with `_` or `.` are no parts. A directory `key=value` within is a column.

    Args:
        path: of the file or directory.
        column_names: the columns of TSV or CSV files without a header line.
        say: is told what was guessed.
        texts: how text files are read; None reads them as TSV.

    Returns:
        Rows in the order of parts and lines.

    Raises:
        DataError: for a missing, empty or malformed file, with its line.
    """
    if not path.is_dir():
        return [SourceRow(path, *row) for row in read_rows(path, column_names, say, texts)]
    rows: list[SourceRow] = []
    parts = _parts(path, _formats(texts))
    for part in parts:
        partition = _partition_values(part.relative_to(path))
        rows += [
            SourceRow(part, line, values | partition)
            for line, values in _read_one(part, column_names, say, texts, _suffix(path))
        ]
    if not rows:
        raise DataError(f"{path}: its files hold no rows", remedy="give files with data in them")
    names = ", ".join(str(part.relative_to(path)) for part in parts[:2])
    more = f" and {len(parts) - 2} more" if len(parts) > 2 else ""
    say(f"{path.name} is a directory, whose files were read: {names}{more}")
    return rows


def read_rows(
    path: Path,
    column_names: Sequence[str] | None = None,
    say: Say = _ignore,
    texts: Texts | None = None,
) -> list[Row]:
    """Read a data file; its ending tells the format.

    Args:
        path: a .tsv, .txt (tab-separated), .csv, .json, .jsonl, .ndjson or .parquet file; it may
            be compressed (.gz, .bz2, .xz).
        column_names: the columns of a TSV or CSV file without a header line.
        say: is told what was guessed.
        texts: how text files are read; None reads them as TSV.

    Returns:
        Line number (row number for Parquet and a JSON array) and values by column.

    Raises:
        DataError: for a missing, empty or malformed file, with its line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such data file", remedy="check data.train and data.dev")
    rows = list(_read_one(path, column_names, say, texts))
    if not rows:
        raise DataError(f"{path}: the file holds no rows", remedy="give a file with data in it")
    return rows


def _read_one(
    path: Path,
    column_names: Sequence[str] | None,
    say: Say,
    texts: Texts | None,
    default_suffix: str = "",
) -> Iterable[Row]:
    suffix, formats = _suffix(path) or default_suffix, _formats(texts)
    if suffix not in formats:
        raise DataError(
            f"{path}: unknown kind of data file", remedy=f"use one of {', '.join(formats)}"
        )
    content = read_content(path, say)
    if content.startswith(PARQUET_MAGIC) and suffix != _PARQUET:
        say(f"{path.name} was read as Parquet, which it is in spite of its name")
        suffix = _PARQUET
    is_text = texts is not None and suffix in TEXT_SUFFIXES
    if column_names and (is_text or suffix not in _DELIMITED):
        say(f"{path.name} names its columns itself: data.column_names is not used for it")
    if suffix == _PARQUET:
        if texts is not None and texts.documents:
            raise _documents_in_a_table(path, texts.documents)
        return _read_parquet(path, content)
    lines = text_lines(path, content, say)
    if texts is not None and texts.documents and not is_text:
        raise _documents_in_a_table(path, texts.documents)
    if texts is not None and is_text:
        return read_documents(path, lines, texts.documents, say)
    if suffix in _DELIMITED:
        return _DELIMITED[suffix](path, lines, column_names, say)
    return _read_json(path, lines)


def _documents_in_a_table(path: Path, how: str) -> DataError:
    return DataError(
        f"{path}: data.documents={how} tells documents of running text apart, and each row of a "
        "table is one",
        remedy=f"remove data.documents, or write the text to a file {path.stem}{TEXT_SUFFIXES[0]}",
    )


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _formats(texts: Texts | None) -> tuple[str, ...]:
    return _FORMATS if texts is None else tuple(dict.fromkeys((*TEXT_SUFFIXES, *_FORMATS)))


def _parts(folder: Path, formats: Sequence[str]) -> list[Path]:
    """List the data files of a directory, which must be of one kind and of one data set."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(name.startswith(("_", ".")) for name in path.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(f"{folder}: no data file in this directory", remedy="check the path")
    kinds = {_suffix(path) or _suffix(folder) for path in files}
    if len(kinds) > 1 or not kinds <= set(formats):
        shown = ", ".join(path.name for path in files[:4])
        raise DataError(
            f"{folder} is a directory, and its files are no parts of one data set: {shown}",
            remedy=f"give one file, or a directory that holds files of one kind alone "
            f"({', '.join(formats)}); names that begin with _ or . do not count",
        )
    splits = {match[1] for path in files if (match := _SPLIT_NAME.match(path.name.lower()))}
    if len(splits) > 1:
        raise DataError(
            f"{folder} is a directory that holds several splits ({', '.join(sorted(splits))})",
            remedy="give the file of one of them, or move them into directories of their own",
        )
    return files


def _partition_values(relative: Path) -> dict[str, str | None]:
    pairs = [name.split("=", 1) for name in relative.parts[:-1] if "=" in name]
    return {
        key: None if value == _NULL_PARTITION else urllib.parse.unquote(value)
        for key, value in pairs
    }


def _read_json(path: Path, lines: list[str]) -> Iterator[Row]:
    """Read one object from each line, an array of objects, or a file of SQuAD's."""
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{") and any('"paragraphs"' in line for line in lines):
        whole = _whole(lines)
        if is_squad(whole):
            yield from squad_rows(path, whole)
            return
    if first.strip() == "{":
        raise DataError(
            f"{path}: one JSON object over several lines",
            remedy="write each row as one object on one line, or all as an array of objects",
        )
    if first.lstrip().startswith("["):
        array = _parsed(path, "\n".join(lines), 1)
        entries: Iterable[tuple[int, Any]] = enumerate(array, start=1)
    else:
        entries = (
            (number, _parsed(path, line, number))
            for number, line in enumerate(lines, start=1)
            if line.strip()
        )
    for number, value in entries:
        if not isinstance(value, dict):
            raise row_error(path, number, "not a JSON object", "write one object on each line")
        yield number, value


def _whole(lines: list[str]) -> Any:
    """All lines as one JSON value; None if they are none, as where each line is one."""
    try:
        return json.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return None


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise row_error(path, line, "malformed JSON: nested too deeply", "mend the line") from error
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        if not text.lstrip().startswith(("{", "[")):
            what = f"not a JSON object: {text[:_SHOWN_CHARACTERS]!r}"
            remedy = (
                "write one object on each line; tab-separated files end in .tsv, others in .csv"
            )
            raise row_error(path, line, what, remedy) from error
        raise row_error(path, line, f"malformed JSON: {error}", "mend the line") from error
    except _RepeatedKeyError as error:
        what = f"the key {error.args[0]!r} stands twice in one object"
        raise row_error(path, line, what, "keep one of them") from error
    except ValueError as error:
        what = "malformed JSON: a number of thousands of digits"
        raise row_error(path, line, what, "mend the line, or write it as text") from error


class _RepeatedKeyError(Exception):
    """A key that stands twice in one object, of which Python would keep the last."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in found if names.count(name) > 1))
    return found


def _read_parquet(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    foreign = foreign_format(content)
    if foreign is not None:
        raise DataError(f"{path} is {foreign[0]} and no Parquet file", remedy=foreign[1])
    try:
        table = pq.read_table(pa.BufferReader(content))
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: a text is not valid UTF-8: {error}", remedy="write the file again"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file: {error}", remedy="write the file again"
        ) from error
    yield from enumerate(rows, start=1)


_Reader = Callable[[Path, list[str], Sequence[str] | None, Say], Iterator[Row]]
_DELIMITED: dict[str, _Reader] = {".tsv": read_tsv, ".txt": read_tsv, ".csv": read_csv}
_FORMATS = (*_DELIMITED, *_JSON_SUFFIXES, _PARQUET)
