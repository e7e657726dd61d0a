from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dist.data.files import read_rows
from moe_dist.errors import DataError

TEXT = "text\tlabel\nein Café 👍\t1\nzwei\t0\n"
ROWS = [(2, {"text": "ein Café 👍", "label": "1"}), (3, {"text": "zwei", "label": "0"})]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.TSV.xz"])
def test_compressed_files_are_read_whatever_their_name(
    tmp_path: Path, pack: Callable[[bytes], bytes], name: str
) -> None:
    said: list[str] = []
    path = write(tmp_path / name, pack(TEXT.encode()))
    assert read_rows(path, say=said.append) == ROWS
    assert len(said) == (1 if name == "a.tsv" else 0)


def test_an_ending_of_a_packed_file_is_no_promise(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "a.tsv.gz", TEXT.encode())) == ROWS


# Without a time in it, since two workers of pytest-xdist must find tests of the same names.
@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.rstrip("\n").replace("\n", "\r").encode() + b"\n",
        gzip.compress(TEXT.replace("\n", "\r").encode("utf-16"), mtime=0),
    ],
)
def test_encodings_and_line_ends(tmp_path: Path, content: bytes) -> None:
    assert read_rows(write(tmp_path / "a.tsv", content)) == ROWS


def test_a_guessed_encoding_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    read_rows(write(tmp_path / "a.tsv", TEXT.encode("utf-16-le")), say=said.append)
    assert said == ["a.tsv was read as UTF-16-LE, though it has no byte order mark"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_carriage_returns_end_lines_of_other_formats_too(tmp_path: Path, ending: str) -> None:
    lines = {"csv": 'text,label\r"a, b",1\r', "jsonl": '{"text": "a, b", "label": "1"}\r'}
    rows = read_rows(write(tmp_path / f"a.{ending}", lines[ending].encode()))
    assert [values for _, values in rows] == [{"text": "a, b", "label": "1"}]


def test_a_carriage_return_in_a_text_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"text\tlabel\none\rtwo\t1\nx\t0\n")
    assert read_rows(path)[0] == (2, {"text": "one\rtwo", "label": "1"})


def test_mixed_line_ends_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"text\tlabel\nx\t0\none\t1\rtwo\t1\r")
    with pytest.raises(DataError, match=r"line 3: 3 fields where 2 columns .*line end CR"):
        read_rows(path)


@pytest.mark.parametrize(
    ("encoding", "text", "named"),
    [
        ("latin-1", "ein Café", "latin1"),
        ("gb18030", "这家餐厅", "gb18030"),
        ("cp1251", "фильм", "cp1251"),
    ],
)
def test_the_remedy_names_a_likely_encoding(
    tmp_path: Path, encoding: str, text: str, named: str
) -> None:
    path = write(tmp_path / "a.tsv", f"text\tlabel\n{text}\t1\n".encode(encoding))
    with pytest.raises(DataError, match=r"line 2: invalid UTF-8 at byte") as caught:
        read_rows(path)
    assert named in caught.value.remedy


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, TEXT)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("a.tsv")
        info.size = len(TEXT.encode())
        archive.addfile(info, io.BytesIO(TEXT.encode()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped("a.tsv"), "is a ZIP archive"),
        (zipped("[Content_Types].xml"), "is an Excel workbook"),
        (tarred(), "is a tar archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Excel workbook"),
        (pickle.dumps([1]), "is a Python pickle"),
        (b"SQLite format 3\x00", "SQLite database"),
        (b"\x28\xb5\x2f\xfd\x04", "zstd"),
        (b"\n<!doctype html>\n<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], "damaged gzip file"),
        (b"\xff\xfe" + TEXT.encode("utf-16-le")[:-1], "invalid UTF-16"),
    ],
)
@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_other_formats_are_named(tmp_path: Path, content: bytes, message: str, ending: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(tmp_path / f"a.{ending}", content))
    assert caught.value.remedy and "iconv" not in caught.value.remedy


def test_parquet_is_recognised_by_its_content(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    said: list[str] = []
    path = tmp_path / "a.csv"
    pq.write_table(pa.table({"text": ["x"]}), path)
    assert read_rows(path, say=said.append) == [(1, {"text": "x"})]
    assert "read as Parquet" in said[0]
    with pytest.raises(DataError, match=r"is a ZIP archive and no Parquet file"):
        read_rows(write(tmp_path / "b.parquet", zipped("a.parquet")))
