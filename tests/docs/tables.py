"""The tables of a Markdown document, and the arithmetic that their headings claim."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Interval = tuple[float, float]
OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "×": operator.mul,
    "÷": operator.truediv,
}
_NUMBER = re.compile(r"([-+−]?\d[\d,]*(?:\.\d+)?)(\s*%)?")
_TOKEN = re.compile(r"\s*([()+×÷]|[^()+×÷]+)")


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        line: of its heading row, from 1.
        section: the text from the nearest heading above to the next one.
        columns: as written.
        rows: cells as written.
    """

    line: int
    section: str
    columns: list[str]
    rows: list[list[str]]


def read_tables(path: Path) -> Iterator[Table]:
    """Read all tables of a document, those in code left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    bounds = [n for n, line in enumerate(lines) if line.startswith("#") and not _in_code(lines, n)]
    for number, line in enumerate(lines):
        if not re.fullmatch(r"\|[-:| ]+\|", line) or _in_code(lines, number):
            continue
        rows = itertools.takewhile(lambda row: row.startswith("|"), lines[number + 1 :])
        first = max(bound for bound in bounds if bound < number)
        last = min((bound for bound in bounds if bound > number), default=len(lines))
        section = "\n".join(lines[first:last])
        yield Table(number, section, _cells(lines[number - 1]), [_cells(row) for row in rows])


def name_of(cell: str) -> str:
    """What a heading or a row is called: without emphasis, unit and remark."""
    return re.split(r",| \(", re.sub(r"[*`]", "", cell))[0].strip()


def number_in(cell: str) -> Interval | None:
    """The values that are written as a cell's first number, or None where there is none."""
    found = _NUMBER.search(cell)
    if found is None:
        return None
    text = found[1].replace(",", "").replace("−", "-")
    half = 0.5 * 10.0 ** -len(text.partition(".")[2])
    unit = 0.01 if found[2] else 1.0
    return unit * (float(text) - half), unit * (float(text) + half)


def claimed_ratio(table: Table, row: list[str], formula: str) -> Interval:
    """Compute what a row's own cells say.

    Args:
        table: the table.
        row: one of its rows.
        formula: names of columns, numbers, `+`, `×`, `÷` and parentheses; `NAME's` is the row of
            that name, in the column that is divided.

    Returns:
        The least and the largest value that the rounded cells allow.

    Raises:
        ValueError: if a name or a number is missing.
    """
    columns = [name_of(column) for column in table.columns]
    tokens = [token.strip() for token in _TOKEN.findall(formula) if token.strip()]
    dividend = next((token for token in tokens if token in columns), "")
    operands: dict[int, Interval] = {}
    for place, token in enumerate(tokens):
        if token not in "()+×÷":
            operands[place] = _operand(token, table, row, columns, dividend)
    values = []
    for corner in itertools.product(*operands.values()):
        chosen = dict(zip(operands, corner, strict=True))
        values.append(_value([chosen.get(place, token) for place, token in enumerate(tokens)]))
    return min(values), max(values)


def _operand(
    token: str, table: Table, row: list[str], columns: list[str], dividend: str
) -> Interval:
    if re.fullmatch(r"[\d.]+", token):
        return float(token), float(token)
    column = token
    if token.endswith("'s"):
        named = [other for other in table.rows if name_of(other[0]) == token[:-2]]
        if len(named) != 1:
            raise ValueError(f"{len(named)} rows are called {token[:-2]!r}")
        row, column = named[0], dividend
    if column not in columns:
        raise ValueError(f"there is no column {column!r} among {columns}")
    found = number_in(row[columns.index(column)])
    if found is None:
        raise ValueError(f"{token!r} has no number in the row {row}")
    return found


def _value(tokens: list[float | str]) -> float:
    """Sums of products, from the left."""
    position = 0

    def next_token() -> float | str | None:
        return tokens[position] if position < len(tokens) else None

    def atom() -> float:
        nonlocal position
        token = next_token()
        position += 1
        if token == "(":
            inner = chain("+", lambda: chain("×÷", atom))
            position += 1
            return inner
        if not isinstance(token, float):
            raise ValueError(f"{token!r} is no operand")
        return token

    def chain(symbols: str, part: Callable[[], float]) -> float:
        nonlocal position
        value = part()
        while isinstance(symbol := next_token(), str) and symbol in symbols:
            position += 1
            value = OPERATORS[symbol](value, part())
        return value

    value = chain("+", lambda: chain("×÷", atom))
    if position != len(tokens):
        raise ValueError(f"{tokens[position]!r} is too much")
    return value


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _in_code(lines: list[str], number: int) -> bool:
    return sum(line.startswith("```") for line in lines[:number]) % 2 == 1
