"""Quotes in CSV and TSV files: read rightly, or refused where they make one row of many."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from moe_dist.data.files import read_rows
from moe_dist.errors import DataError

ROWS = [(f"film number {i} was fine", ("good", "bad")[i % 2]) for i in range(30)]


def raw(header: str, rows: Sequence[Sequence[str]], *, sign: str = ",") -> str:
    return "\n".join([header.replace(",", sign), *(sign.join(row) for row in rows)]) + "\n"


def read(folder: Path, content: str, name: str = "a.csv", say: list[str] | None = None) -> list:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return read_rows(path, say=([] if say is None else say).append)


@pytest.mark.parametrize(("first", "last"), [(4, 5), (4, 20), (0, 29)])
@pytest.mark.parametrize("opening", ['"', '"""'])
@pytest.mark.parametrize("layout", ["text,label", "label,text", "id,text,label"])
def test_a_quote_that_takes_in_rows_is_refused_with_its_line(
    tmp_path: Path, first: int, last: int, opening: str, layout: str
) -> None:
    rows = []
    for i, (text, label) in enumerate(ROWS):
        text = opening + text if i == first else text
        # In the last column a closing quote ends the line; elsewhere a comma follows it.
        text = text + ' "' if i == last else text
        rows.append([{"text": text, "label": label, "id": f"q{i}"}[c] for c in layout.split(",")])
    with pytest.raises(DataError, match=rf"a\.csv, line {first + 2}: the quote that opens here"):
        read(tmp_path, raw(layout, rows))


def test_all_quotes_are_named(tmp_path: Path) -> None:
    rows = [list(row) for row in ROWS]
    for first, last in ((3, 8), (12, 13)):
        rows[first][0] = '"' + rows[first][0]
        rows[last][0] += ' "'
    with pytest.raises(DataError, match=r"line 5: .*up to line 10, .*so on line 14 \(8 lines in 2"):
        read(tmp_path, raw("text,label", rows))


def test_numbers_as_labels_count_as_rows(tmp_path: Path) -> None:
    rows = [[text, f"{i / 7:.4f}"] for i, (text, _) in enumerate(ROWS)]
    rows[3][0] = '"' + rows[3][0]
    rows[9][0] += ' "'
    with pytest.raises(DataError, match="line 5: the quote that opens here"):
        read(tmp_path, raw("text,score", rows))


@pytest.mark.parametrize(
    "text",
    [
        'one, "two"\nthree, four\n\nfive',
        "Dear team,\nplease help, soon\nbye, Ann",
        "a list:\ngood things\nbad things",
        "a,b\nc,d\ne,f",
        "roses are red,\nviolets are blue,\nsugar is sweet,\nand so are you,",
    ],
)
@pytest.mark.parametrize("layout", [["text", "label"], ["label", "text"]])
def test_texts_of_several_lines_are_read(tmp_path: Path, text: str, layout: list[str]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, layout, lineterminator="\n")
    writer.writeheader()
    rows = [{"text": text, "label": label} for text, label in [*ROWS, (text, "good")]]
    writer.writerows(rows)
    assert [values for _, values in read(tmp_path, buffer.getvalue())] == rows


def test_a_quote_that_never_closes_is_named_where_it_opens(tmp_path: Path) -> None:
    rows = [list(row) for row in ROWS]
    rows[7][0] = '"' + rows[7][0]
    with pytest.raises(DataError, match=r"line 9: malformed CSV: the quote that opens here is nev"):
        read(tmp_path, raw("text,label", rows))


def test_a_quote_that_ends_amid_a_text_is_named_with_its_beginning(tmp_path: Path) -> None:
    rows = [list(row) for row in ROWS]
    rows[7][0] = '"' + rows[7][0]
    rows[11][0] = 'a "fine" film'
    with pytest.raises(DataError, match=r"line 13: malformed CSV: .*began on line 9"):
        read(tmp_path, raw("text,label", rows))


def test_fields_of_any_length_are_read_and_the_limit_is_left(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = read(tmp_path, raw("text,label", [("long " * 50_000, "a"), ("short", "b")]))
    assert len(rows[0][1]["text"]) == 250_000
    assert csv.field_size_limit() == before


QUOTED = [('he said "no"', "a"), ("plain", "b"), ('"whole"', "a"), ("4", "b")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("text", ["", "two\nlines", "a\ttab", 'a "quote"\nand\nlines'])
def test_a_quoted_tsv_is_unquoted_and_said(tmp_path: Path, quoting: int, text: str) -> None:
    frame = pd.DataFrame([*QUOTED, (text, "b")], columns=["text", "label"])
    said: list[str] = []
    content = frame.to_csv(sep="\t", index=False, quoting=quoting)
    rows = read(tmp_path, content, "a.tsv", said)
    assert [tuple(values.values()) for _, values in rows] == [*QUOTED, (text, "b")]
    assert len(said) == 1 and "a.tsv is a quoted TSV" in said[0]


def test_a_tsv_that_quotes_all_texts_is_unquoted(tmp_path: Path) -> None:
    rows = read(tmp_path, '"text"\t"label"\n"a film"\t1\n"a plot"\t0\n', "a.tsv")
    assert rows[0] == (2, {"text": "a film", "label": "1"})


@pytest.mark.parametrize(
    ("texts", "num_said"),
    [
        (['" half', "none"], 0),
        (['he said "no"', "none"], 0),
        (['"the whole text"', "none"], 0),
        (['"he said ""no"""', 'another "no"'], 1),
        (['"he said ""no"""', '"'], 1),
    ],
)
def test_quotes_of_a_raw_tsv_stay(tmp_path: Path, texts: list[str], num_said: int) -> None:
    said: list[str] = []
    rows = read(tmp_path, raw("text,label", [(t, "a") for t in texts], sign="\t"), "a.tsv", said)
    assert [values["text"] for _, values in rows] == texts
    assert len(said) == num_said


def test_a_raw_tsv_with_a_wrong_line_is_not_taken_for_a_quoted_one(tmp_path: Path) -> None:
    rows = [list(row) for row in ROWS]
    rows[3][0] = '"' + rows[3][0]
    rows[9][0] += '"'
    rows[20] = ["one field"]
    with pytest.raises(DataError, match="line 22: 1 fields where 2 columns"):
        read(tmp_path, raw("text,label", rows, sign="\t"), "a.tsv")


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.tsv", "text\tlabel\nx\t1\n", ["text", "label"]),
        ("a.tsv", "Text\tLABEL \nx\t1\n", ["text", "label"]),
        ("a.csv", '"text","label"\nx,1\n', ["text", "label"]),
        ("a.csv", "sentence,label\nx,1\n", ["text", "label"]),
        ("a.tsv", "source\tlabel\tnote\ttext\nx\t1\t\ty\n", ["s", "label", "n", "t"]),
    ],
)
def test_a_header_is_no_row(tmp_path: Path, name: str, content: str, names: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=r"line 1: this is a header") as caught:
        read_rows(path, names)
    assert "drop data.column_names" in caught.value.remedy


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_header_among_the_rows_is_none(tmp_path: Path, name: str, sign: str) -> None:
    rows = [*ROWS[:4], ("text", "label"), *ROWS[4:]]
    with pytest.raises(DataError, match=rf"{name}, line 6: this is the header again"):
        read(tmp_path, raw("text,label", rows, sign=sign), name)


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", ",")])
def test_another_separator_is_named(tmp_path: Path, name: str, sign: str) -> None:
    with pytest.raises(DataError, match=r"the header .* is one field, and it holds") as caught:
        read(tmp_path, raw("text,label", ROWS, sign=sign), name)
    assert "separate fields by" in caught.value.remedy
