"""Rows of CSV and TSV files, and the quotes that make one row of many."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_dist.data.rows import Row, Say, is_number, row_error
from moe_dist.errors import DataError

_QUOTE = '"'
_HEADERLESS = "a file without a header line needs data.column_names"
_DOUBLE_QUOTES = (
    'put such a text into quotes and double those inside it ("""so"" it begins"), or write the '
    "file as JSON lines"
)


@dataclass(frozen=True)
class _Record:
    """One row: its first and last line, both 1-based, and its fields."""

    first_line: int
    line: int
    values: list[str]

    def opening_line(self) -> int:
        """Where the quote opens that takes in a line end; the first line where none does."""
        line = self.first_line
        for value in self.values:
            if "\n" in value:
                break
        else:
            return line
        return line + sum(v.count("\n") for v in self.values[: self.values.index(value)])


def read_csv(
    path: Path, lines: list[str], column_names: Sequence[str] | None, say: Say
) -> Iterator[Row]:
    """Read comma-separated fields, quoted where they hold commas, quotes or line ends.

    Rows are numbered by the line that they end on; a DataError names a malformed one.
    """
    records = _parse_quoted(path, lines, ",")
    _refuse_swallowed(path, records, lines, ",")
    return _with_header(path, records, column_names, ",")


def read_tsv(
    path: Path, lines: list[str], column_names: Sequence[str] | None, say: Say
) -> Iterator[Row]:
    """Read tab-separated fields: as they stand, unless the whole file is quoted like a CSV file.

    Texts of many tab-separated files (GLUE's) hold quotes that mean nothing. What pandas, R or a
    spreadsheet wrote is told from these: there every field with a quote in it is wrapped in quotes,
    and those inside it are doubled.
    """
    records = [_Record(n, n, line.split("\t")) for n, line in enumerate(lines, 1) if line]
    if any(_QUOTE in line for line in lines):
        records = _read_quotes(path, records, lines, say)
    return _with_header(path, records, column_names, "\t")


def _read_quotes(path: Path, records: list[_Record], lines: list[str], say: Say) -> list[_Record]:
    """Remove the quotes around the fields of a quoted file; other files stay as they are."""
    width = len(records[0].values)
    if any(len(record.values) != width for record in records):
        quoted = _quoted_over_lines(path, lines)
        if quoted is None:
            return records
        say(f"{path.name} is a quoted TSV: quotes around fields were removed, line ends kept")
        return quoted
    fields = [(r.line, value) for r in records for value in r.values]
    with_quotes = [(line, value) for line, value in fields if _QUOTE in value]
    stray = next((line for line, value in with_quotes if not _is_quoted(value)), None)
    doubled = [line for line, value in with_quotes if _is_quoted(value) and '""' in value[1:-1]]
    if stray is not None:
        if doubled:
            say(
                f"{path.name}: quotes stay in the texts as they stand; line {doubled[0]} looks "
                f"quoted, with its inner quotes doubled, but line {stray} does not"
            )
        return records
    if not doubled and not all(_is_quoted(value) or is_number(value) for _, value in fields):
        return records
    say(f"{path.name} is a quoted TSV: quotes around {len(with_quotes)} fields were removed")
    return [
        _Record(r.first_line, r.line, [_unquoted(value) for value in r.values]) for r in records
    ]


def _quoted_over_lines(path: Path, lines: list[str]) -> list[_Record] | None:
    """Read a TSV whose quoted fields hold tabs or line ends; None if it is no such file."""
    try:
        records = _parse_quoted(path, lines, "\t")
        _refuse_swallowed(path, records, lines, "\t")
    except DataError:
        return None
    is_even = all(len(record.values) == len(records[0].values) for record in records)
    return records if is_even else None


def _is_quoted(value: str) -> bool:
    inner = value[1:-1]
    return (
        len(value) > 1
        and value[0] == value[-1] == _QUOTE
        and _QUOTE not in inner.replace(_QUOTE * 2, "")
    )


def _unquoted(value: str) -> str:
    return value[1:-1].replace(_QUOTE * 2, _QUOTE) if _is_quoted(value) else value


def _parse_quoted(path: Path, lines: list[str], delimiter: str) -> list[_Record]:
    taken: list[str] = []

    def feed() -> Iterator[str]:
        for line in lines:
            # csv wants line ends, since a quoted field may hold some.
            taken.append(line + "\n")
            yield taken[-1]

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    records: list[_Record] = []
    with _long_fields():
        while True:
            first_line = reader.line_num + 1
            taken.clear()
            try:
                values = next(reader)
            except StopIteration:
                return records
            except csv.Error as error:
                lenient = next(csv.reader(taken, delimiter=delimiter))
                opened = _Record(first_line, reader.line_num, lenient).opening_line()
                raise _malformed(path, opened, reader.line_num, str(error)) from error
            if values:
                records.append(_Record(first_line, reader.line_num, values))


def _malformed(path: Path, opened: int, line: int, fault: str) -> DataError:
    if "unexpected end of data" in fault:
        what = "malformed CSV: the quote that opens here is never closed"
        return row_error(path, opened, what, _DOUBLE_QUOTES)
    began = f"; the quoted field began on line {opened}" if opened != line else ""
    return row_error(path, line, f"malformed CSV: {fault}{began}", _DOUBLE_QUOTES)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a field be of any length; the limit is one of the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _refuse_swallowed(path: Path, records: list[_Record], lines: list[str], delimiter: str) -> None:
    """Refuse a file where most lines of a field look like rows: a quote opened in raw text.

    A line looks like a row if it has as many fields as the header, and in a column other than the
    one with the line ends a value that this column has elsewhere too.
    """
    long = [record for record in records if any("\n" in value for value in record.values)]
    if not long:
        return
    width = len(records[0].values)
    short = [r.values for r in records[1:] if r.line == r.first_line and len(r.values) == width]
    columns = [set(column) for column in zip(*short, strict=True)] or [set()] * width
    numeric = [bool(column) and all(map(is_number, column)) for column in columns]
    found: list[_Record] = []
    num_lines = 0
    for record in long:
        inside = lines[record.first_line - 1 : record.line]
        rows = [line.split(delimiter) for line in inside if line.count(delimiter) == width - 1]
        if 2 * len(rows) <= len(inside):
            continue
        others = [column for column, value in enumerate(record.values[:width]) if "\n" not in value]
        repeated = [Counter(row[column] for row in rows) for column in range(width)]
        num_rows = sum(
            any(
                row[column] in columns[column]
                or (row[column] and repeated[column][row[column]] > 1)
                or (numeric[column] and is_number(row[column]))
                for column in others
            )
            for row in rows
        )
        if 2 * num_rows > len(inside):
            found.append(record)
            num_lines += len(inside)
    if found:
        first = found[0]
        more = [str(record.opening_line()) for record in found[1:4]]
        also = f"; so on line {', '.join(more)}" if more else ""
        raise row_error(
            path,
            first.opening_line(),
            f"the quote that opens here takes in all text up to line {first.line}, and most of "
            f"these lines look like rows themselves{also} ({num_lines} lines in "
            f"{len(found)} rows)",
            _DOUBLE_QUOTES,
        )


def _with_header(
    path: Path, records: list[_Record], column_names: Sequence[str] | None, delimiter: str
) -> Iterator[Row]:
    if column_names:
        header = list(column_names)
        _refuse_header(path, records, header)
    else:
        header = records[0].values if records else []
        records = records[1:]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: columns named twice: {', '.join(map(repr, twice))}",
            remedy=f"rename one of each; {_HEADERLESS}",
        )
    if header and header[0].lstrip().startswith(("{", "[{")):
        raise DataError(f"{path} holds JSON", remedy="give it the ending .jsonl")
    if len(header) == 1 and not column_names:
        others = [sign for sign in ",;\t|" if sign != delimiter and sign in header[0]]
        if others:
            raise DataError(
                f"{path}: the header {header[0]!r} is one field, and it holds {others[0]!r}",
                remedy=f"separate fields by {delimiter!r}, or give the file the ending of its "
                "format: .tsv for tabs, .csv for commas",
            )
    for record in records:
        if record.values == header and len(header) > 1:
            raise row_error(
                path,
                record.line,
                "this is the header again, as where files were joined",
                "drop the line",
            )
        if len(record.values) != len(header):
            mixed = ", and a line end CR" if any("\r" in value for value in record.values) else ""
            raise row_error(
                path,
                record.line,
                f"{len(record.values)} fields where {len(header)} columns are named{mixed}",
                f"mend the line; {_HEADERLESS}",
            )
        yield record.line, dict(zip(header, record.values, strict=True))


def _refuse_header(path: Path, records: list[_Record], names: list[str]) -> None:
    first = records[0].values if records else []
    same = [
        name
        for name, value in zip(names, first, strict=False)
        if value.strip(' "\ufeff').casefold() == name.strip().casefold()
    ]
    if same:
        raise row_error(
            path,
            records[0].line,
            f"this is a header and no row: data.column_names has {', '.join(map(repr, same))} too",
            "drop data.column_names, whose place the header takes, or drop the line",
        )
