from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from moe_dist.data.files import read_place, read_rows
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
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', r"line 2: the key 'a' stands twice"),
        ("a.json", '[{"a": 1, "a": 3}]\n', r"the key 'a' stands twice"),
        ("a.jsonl", f'{{"a": 1}}\n{{"a": {"9" * 5000}}}\n', r"line 2: .*thousands of digits"),
        ("a.jsonl", "[" * 100_000, r"line 1: malformed JSON: nested too deeply"),
        ("a.jsonl", "text\tlabel\nx\t1\n", r"line 1: not a JSON object: 'text\\tlabel'"),
        ("a.tsv", '{"text": "x", "label": 1}\n', r"a\.tsv holds JSON"),
        ("a.csv", '[{"text": "x", "label": 1}]\n', r"a\.csv holds JSON"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.parquet", "", "not a readable Parquet file"),
        ("a.xls", "x", "unknown kind of data file"),
        ("a.json", '{\n "text": "x"\n}\n', "one JSON object over several lines"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(tmp_path, name, content))
    assert caught.value.remedy


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        read_rows(tmp_path / "absent.tsv")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_array_is_read_like_lines(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, '[\n {"text": "x", "label": 1},\n {"text": "y", "label": 0}\n]\n')
    assert read_rows(path) == [(1, {"text": "x", "label": 1}), (2, {"text": "y", "label": 0})]
    with pytest.raises(DataError, match=r"line 3: malformed JSON"):
        read_rows(write(tmp_path, name, '[\n {"text": "x"},\n {"text" "y"}\n]\n'))


def test_column_names_of_a_file_that_has_its_own_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    read_rows(write(tmp_path, "a.jsonl", '{"text": "x"}\n'), ["text", "label"], said.append)
    assert said == ["a.jsonl names its columns itself: data.column_names is not used for it"]


def test_parquet_text_that_is_no_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not valid UTF-8"):
        read_rows(tmp_path / "a.parquet")


PARTS = {
    ".csv": "text,label\nx{0},1\ny{0},0\n",
    ".tsv": "text\tlabel\nx{0}\t1\ny{0}\t0\n",
    ".json": '{{"text": "x{0}", "label": "1"}}\n{{"text": "y{0}", "label": "0"}}\n',
}


@pytest.mark.parametrize("ending", PARTS)
@pytest.mark.parametrize("pack", [False, True])
def test_a_directory_of_parts_is_read(tmp_path: Path, ending: str, pack: bool) -> None:
    folder = tmp_path / f"rows{ending}"
    folder.mkdir()
    for name in ("_SUCCESS", "._SUCCESS.crc", f".part-0{ending}.crc", f"_metadata{ending}"):
        (folder / name).write_bytes(b"\x00\x01")
    for part in (1, 0):
        content = PARTS[ending].format(part).encode()
        name = f"part-0000{part}-c000{ending}"
        write(folder, f"{name}.gz" if pack else name, gzip.compress(content) if pack else content)
    write(folder, f"part-00002{ending}", PARTS[ending].splitlines()[0] if ending != ".json" else "")
    said: list[str] = []
    rows = read_place(folder, say=said.append)
    assert [row.values["text"] for row in rows] == ["x0", "y0", "x1", "y1"]
    first = 1 if ending == ".json" else 2
    assert [(row.origin.name[:10], row.line - first) for row in rows[1:3]] == [
        ("part-00000", 1),
        ("part-00001", 0),
    ]
    assert "whose files were read: part-00000" in said[0]


def test_a_directory_of_parquet_parts_with_a_column_in_its_names(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "rows.parquet"
    for label, text in (("very good", "x"), ("bad", "y")):
        part = folder / f"label={label.replace(' ', '%20')}"
        part.mkdir(parents=True)
        pq.write_table(pa.table({"text": [text]}), part / "part-0.snappy.parquet")
    (folder / "_SUCCESS").touch()
    said: list[str] = []
    assert [row.values for row in read_place(folder, say=said.append)] == [
        {"text": "y", "label": "bad"},
        {"text": "x", "label": "very good"},
    ]
    assert "label=bad/part-0.snappy.parquet, label=very%20good/part-0" in said[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no data file in this directory"),
        (["_SUCCESS"], "no data file in this directory"),
        (["a.csv", "b.tsv"], "no parts of one data set: a.csv, b.tsv"),
        (["a.csv", "notes.docx"], "no parts of one data set: a.csv, notes.docx"),
        (["train.csv", "dev.csv"], r"holds several splits \(dev, train\)"),
        (["train-0.csv", "validation-0.csv"], r"several splits \(train, valid\)"),
        (["part-0.csv"], "its files hold no rows"),
    ],
)
def test_a_directory_that_is_no_data_set(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("text,label\n")
    with pytest.raises(DataError, match=message) as caught:
        read_place(tmp_path)
    assert caught.value.remedy
