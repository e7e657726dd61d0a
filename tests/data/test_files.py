from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.data.files import read_rows
from moe_dist.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_tsv_keeps_quotes_and_line_separators_of_unicode(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", '\ufefftext\tlabel\r\n"half a quote\t0\r\none\u2028two\t1\r\n')
    assert read_rows(path) == [
        (2, {"text": '"half a quote', "label": "0"}),
        (3, {"text": "one\u2028two", "label": "1"}),
    ]


def test_csv_handles_quotes_and_numbers_lines_by_their_end(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,label\n"a, ""b""\nc",0\nd,1\n')
    assert read_rows(path) == [
        (3, {"text": 'a, "b"\nc', "label": "0"}),
        (4, {"text": "d", "label": "1"}),
    ]


def test_column_names_stand_in_for_a_header(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "x\t1\ny\t0\n")
    assert read_rows(path, ["text", "label"])[0] == (1, {"text": "x", "label": "1"})


def test_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "x", "label": 1}\n\n{"text": "y", "label": 0}\n')
    assert read_rows(path) == [(1, {"text": "x", "label": 1}), (3, {"text": "y", "label": 0})]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "score": [0.5, 1.0]}), path)
    assert read_rows(path) == [(1, {"text": "x", "score": 0.5}), (2, {"text": "y", "score": 1.0})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "holds no rows"),
        ("a.tsv", "text\tlabel\n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.tsv", b"text\tlabel\nok\t1\ncaf\xe9\t0\n", r"a\.tsv, line 3: invalid UTF-8 at byte 4"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl, line 1: invalid UTF-8"),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", r"line 3: 1 fields where 2 columns"),
        ("a.csv", "text,text\nx,y\n", "columns named twice: 'text'"),
        ("a.csv", 'text,label\n"x,1\n', r"line 2: malformed CSV"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"line 2: malformed JSON"),
        ("a.jsonl", "[1]\n", r"line 1: not a JSON object"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.parquet", "", "not a readable Parquet file"),
        ("a.xls", "x", "unknown kind of data file"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(tmp_path, name, content))
    assert caught.value.remedy


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        read_rows(tmp_path / "absent.tsv")
