"""Read rows from TSV, CSV, JSON lines and Parquet, and name file and line of every fault."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_dist.errors import DataError

# A row is its line in the file and its values by column.
Row = tuple[int, dict[str, Any]]


def read_rows(path: Path, column_names: Sequence[str] | None = None) -> list[Row]:
    """Read a data file; its ending tells the format.

    Args:
        path: a .tsv, .txt (tab-separated), .csv, .jsonl, .ndjson or .parquet file.
        column_names: the columns of a TSV or CSV file without a header line.

    Returns:
        Line number (row number for Parquet) and values by column.

    Raises:
        DataError: for a missing, empty or malformed file, with its line.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown kind of data file", remedy=f"use one of {', '.join(_READERS)}"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such data file", remedy="check data.train and data.dev")
    rows = list(reader(path, column_names))
    if not rows:
        raise DataError(f"{path}: the file holds no rows", remedy="give a file with data in it")
    return rows


def row_error(path: Path, line: int, message: str, remedy: str) -> DataError:
    """The error for one row of a file.

    Args:
        path: the file.
        line: 1-based.
        message: what is wrong.
        remedy: what to do.

    Returns:
        An error that begins with file and line.
    """
    return DataError(f"{path}, line {line}: {message}", remedy=remedy)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise row_error(
                    path,
                    number,
                    f"invalid UTF-8 at byte {error.start + 1} of the line",
                    f"convert the file, for example: iconv -f latin1 -t utf-8 {path.name}",
                ) from error
            yield number, text.rstrip("\r\n")


def _read_tsv(path: Path, column_names: Sequence[str] | None) -> Iterator[Row]:
    fields = ((number, line.split("\t")) for number, line in _lines(path) if line)
    return _with_header(path, fields, column_names)


def _read_csv(path: Path, column_names: Sequence[str] | None) -> Iterator[Row]:
    # csv wants line ends, since a quoted field may hold some.
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)

    def fields() -> Iterator[tuple[int, list[str]]]:
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise row_error(
                    path, reader.line_num, f"malformed CSV: {error}", "mend the line"
                ) from error
            if values:
                yield reader.line_num, values

    return _with_header(path, fields(), column_names)


def _with_header(
    path: Path, fields: Iterator[tuple[int, list[str]]], column_names: Sequence[str] | None
) -> Iterator[Row]:
    header = list(column_names) if column_names else next(fields, (0, []))[1]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: columns named twice: {', '.join(map(repr, twice))}",
            remedy="rename one of each; a file without a header line needs data.column_names",
        )
    for number, values in fields:
        if len(values) != len(header):
            raise row_error(
                path,
                number,
                f"{len(values)} fields where {len(header)} columns are named",
                "mend the line; a file without a header line needs data.column_names",
            )
        yield number, dict(zip(header, values, strict=True))


def _read_jsonl(path: Path, column_names: Sequence[str] | None) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise row_error(path, number, f"malformed JSON: {error}", "mend the line") from error
        if not isinstance(value, dict):
            raise row_error(path, number, "not a JSON object", "write one object on each line")
        yield number, value


def _read_parquet(path: Path, column_names: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file: {error}", remedy="write the file again"
        ) from error
    yield from enumerate(table.to_pylist(), start=1)


_READERS: dict[str, Callable[[Path, Sequence[str] | None], Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".txt": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
