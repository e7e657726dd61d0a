"""Check the labels of rows, and find the classes where none are given."""

from __future__ import annotations

import ast
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_dist.data.rows import SourceRow, is_number
from moe_dist.errors import DataError

MAX_VALUE = 1e18
"""Of a regression label: squared, and summed over a batch, 32-bit floats still hold it."""
UNLABELLED = "-1"
"""What data sets of the hub put where a row has no class."""
_MAX_INFERRED_CLASSES = 1000
_MANY_CLASSES = 20
_FEW_ROWS = 5
_MAX_ID_DIGITS = 9
_SHOWN = 5
# What people and programs write where there is no class; rare beside the others if so.
_PLACEHOLDERS = {"-1", "-", "--", "?", "n/a", "na", "nan", "none", "null", "unknown", "unlabelled"}
_RARE_SHARE = 0.5
_SHOWN_LENGTH = 40


def is_missing(label: Any) -> bool:
    """Whether there is no label."""
    is_nan = isinstance(label, float) and math.isnan(label)
    return label is None or is_nan or (isinstance(label, str) and not label.strip())


def class_key(row: SourceRow, label: Any) -> str:
    """Give a class's name as its row writes it, stripped; DataError if it has not just one."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if is_missing(label):
        raise row.error("the label is missing", "fill it in or drop the line")
    if isinstance(label, list | tuple | set | dict | bytes):
        raise _no_single_label(row, label)
    return encodable(row, "label", str(label).strip())


def encodable(row: SourceRow, column: str, text: str) -> str:
    """Refuse a text that UTF-8 cannot hold, such as one with half of a character's escapes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise row.error(
            f"column {column!r} holds half a character ({text[error.start]!r} alone) at character "
            f"{error.start + 1}",
            "mend or drop the line; a text that was cut, or escapes that lost their second half",
        ) from error
    return text


def infer_names(
    labels: Iterable[tuple[SourceRow, Any]], label_column: str, *, skip_missing: bool
) -> list[str]:
    """Find the classes of a data set whose classes nobody named.

    Args:
        labels: the training rows, each with its label.
        label_column: for errors.
        skip_missing: leave rows without a label out.

    Returns:
        Sorted, as numbers where all are whole numbers.

    Raises:
        DataError: if a label is no single one, or there are too few or too many classes.
    """
    found: dict[str, SourceRow] = {}
    origin = None
    for row, label in labels:
        origin = origin or row.origin
        if not (skip_missing and is_missing(label)):
            found.setdefault(class_key(row, label), row)
    for name, row in found.items():
        if name.startswith(("[", "{", "(")) and _is_container(name):
            raise _no_single_label(row, name)
    if not 2 <= len(found) <= _MAX_INFERRED_CLASSES:
        only = f" ({', '.join(map(repr, found))})" if len(found) == 1 else ""
        raise DataError(
            f"{origin}: column {label_column!r} holds {len(found)} different labels{only}",
            remedy="check data.label_column; for numbers to be predicted set data.kind=regression",
        )
    try:
        return sorted(found, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(found)


def refuse_header_label(rows: Sequence[SourceRow], label_column: str) -> None:
    """Refuse a first row whose label alone is no number: the header of a file read without one.

    Args:
        rows: of one file that was given column names.
        label_column: of their labels.

    Raises:
        DataError: if the first row is a header.
    """
    first, rest = rows[0], rows[1:]
    label = first.values.get(label_column)
    if len(rest) < 2 or is_missing(label) or is_number(label):
        return
    if all(is_number(row.values.get(label_column)) for row in rest):
        raise first.error(
            f"this looks like a header: its label {label!r} is no number, and all others are",
            "drop data.column_names, whose place the header takes, or mend or drop the line",
        )


def class_id(row: SourceRow, label: Any, ids: Mapping[str, int], may_be_id: bool) -> int:
    """Give the number of a row's class; DataError if there is no such class.

    With `may_be_id` the label may be the number itself.
    """
    key = class_key(row, label)
    if key in ids:
        return ids[key]
    looks_like_id = key.isdecimal() and len(key) <= _MAX_ID_DIGITS and int(key) < len(ids)
    if may_be_id and looks_like_id:
        return int(key)
    why = ", whose names were found in the training rows" if looks_like_id else ""
    remedy = "mend the line, or set data.label_names"
    if why:
        remedy += " in the order of the numbers; only then are numbers read as ids"
    elif is_number(key) and len(ids) >= _MANY_CLASSES and all(map(is_number, ids)):
        remedy = "set data.kind=regression if labels are values to be predicted"
    raise row.error(
        f"label {key!r} is not in the list {shown(list(map(repr, ids)))}{why}",
        remedy,
    )


def regression_value(row: SourceRow, label: Any) -> float:
    """Give the number that a row's label is.

    Args:
        row: for errors.
        label: its label.

    Returns:
        The number.

    Raises:
        DataError: if it is none, or too large to train on in 32-bit floats.
    """
    try:
        number = math.nan if isinstance(label, list | dict | bytes) else float(label)
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:
        number = 2 * MAX_VALUE
    if math.isfinite(number) and abs(number) > MAX_VALUE:
        raise row.error(
            f"label {str(label)[:40]} is too large: 32-bit floats cannot hold the squared error",
            f"divide the labels by a constant, so that all lie within ±{MAX_VALUE:g}",
        )
    if not math.isfinite(number):
        has_comma = isinstance(label, str) and is_number(label.replace(",", ".", 1))
        remedy = "write decimals with a point" if has_comma else "mend or drop the line"
        raise row.error(f"label {label!r} is not a finite number", remedy)
    return number


def class_warnings(train: Mapping[str, int], dev: Mapping[str, int]) -> list[str]:
    """Say what is odd about the classes of a data set.

    Args:
        train: training rows of each class, in the order of their ids.
        dev: dev rows of each class.

    Returns:
        One line for each oddity.
    """
    found = []
    names = list(train)
    if all(map(is_number, names)) and not all(float(name).is_integer() for name in names):
        found.append(
            f"all {len(names)} classes are numbers, some with fractions ({shown(names)}): set "
            "data.kind=regression if they are values to be predicted"
        )
    num_rows = sum(train.values())
    if len(names) >= _MANY_CLASSES and num_rows < _FEW_ROWS * len(names):
        found.append(
            f"{len(names)} classes for {num_rows} training rows, {num_rows / len(names):.1f} for "
            f"each ({shown(names)}): check data.label_column, or set data.kind=regression for "
            "numbers"
        )
    found += _mixed_names(names) + _placeholders(train)
    alike = [" and ".join(map(repr, group)) for group in _names_alike(names)]
    if alike:
        found.append(
            f"classes that differ only in how they are written: {shown(alike)}; write them alike "
            "if they are one class"
        )
    for split, counts in (("training", train), ("dev", dev)):
        absent = [name for name in names if not counts.get(name)]
        if absent:
            noun = "class" if len(absent) == 1 else "classes"
            found.append(f"no {split} row is of the {noun} {shown(list(map(repr, absent)))}")
    return found


def shown(names: Sequence[str]) -> str:
    """Write a list of names, each cut where it is long, with their number where there are many."""
    names = [
        name if len(name) <= _SHOWN_LENGTH else f"{name[: _SHOWN_LENGTH - 1]}…" for name in names
    ]
    if len(names) <= 2 * _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


def _names_alike(names: Sequence[str]) -> list[list[str]]:
    """Group the names that only case, white space or the writing of a number tells apart."""
    groups: dict[str, list[str]] = {}
    for name in names:
        plain = " ".join(unicodedata.normalize("NFKC", name).split()).casefold()
        key = str(float(plain)) if is_number(plain) else plain
        groups.setdefault(key, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _mixed_names(names: Sequence[str]) -> list[str]:
    """Say that some classes are numbers and others words, as where two files were joined."""
    numbers = [name for name in names if is_number(name)]
    words = [name for name in names if not is_number(name) and not _is_placeholder(name)]
    if min(len(numbers), len(words)) < 2:
        return []
    return [
        f"some classes are numbers and others words: {shown(numbers)} beside {shown(words)}; write "
        "them alike if both mean the same"
    ]


def _placeholders(counts: Mapping[str, int]) -> list[str]:
    """Say which rare classes may be none."""
    mean = sum(counts.values()) / max(1, len(counts))
    return [
        f"{count} training rows are of the class {name!r}, which often stands where a row has no "
        "class; leave them out if so"
        for name, count in counts.items()
        if len(counts) > 2 and _is_placeholder(name) and count < _RARE_SHARE * mean
    ]


def _is_placeholder(name: str) -> bool:
    return name.casefold() in _PLACEHOLDERS


def _no_single_label(row: SourceRow, label: Any) -> DataError:
    kind = "a list written as text" if isinstance(label, str) else f"of type {type(label).__name__}"
    return row.error(
        f"the label is {kind}, {str(label)[:80]}, and one label for each row is needed",
        "give the one that counts; for several labels write one column, and one task, for each",
    )


def _is_container(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), list | tuple | set | dict)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
