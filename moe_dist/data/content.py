"""Bring a file's bytes to text: compressed files, other encodings, line ends of every kind."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path

from moe_dist.data.rows import Say, row_error
from moe_dist.errors import DataError

PARQUET_MAGIC = b"PAR1"
COMPRESSION_SUFFIXES = (".gz", ".gzip", ".bz2", ".xz")
_SAMPLE_BYTES = 4096
_MIN_ZERO_SHARE = 0.4

_COMPRESSED: dict[str, tuple[re.Pattern[bytes], Callable[[bytes], bytes]]] = {
    "gzip": (re.compile(rb"\x1f\x8b\x08"), gzip.decompress),
    "bzip2": (re.compile(rb"BZh[1-9]1AY&SY"), bz2.decompress),
    "xz": (re.compile(rb"\xfd7zXZ\x00"), lzma.decompress),
}
_SAVE_AS_TEXT = "save it as CSV, TSV, JSON lines or Parquet"
_FOREIGN: tuple[tuple[re.Pattern[bytes], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), name, remedy)
    for pattern, name, remedy in (
        (rb"PK\x03\x04.{26,30}(\[Content_Types\]|_rels/|xl/)", "an Excel workbook", _SAVE_AS_TEXT),
        (rb"PK\x03\x04", "a ZIP archive", "unpack it and give the file inside"),
        (rb"\xd0\xcf\x11\xe0", "an old Excel workbook", _SAVE_AS_TEXT),
        (rb".{257}ustar[\x00 ]", "a tar archive", "unpack it and give the file inside"),
        (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with `unzstd`"),
        (rb"ARROW1\x00", "an Arrow file", _SAVE_AS_TEXT),
        (rb"\xff\xff\xff\xff.{2}\x00\x00", "an Arrow stream", _SAVE_AS_TEXT),
        (rb"Obj\x01", "an Avro file", _SAVE_AS_TEXT),
        (rb"ORC[\x00-\x1f]", "an ORC file", _SAVE_AS_TEXT),
        (rb"\x89HDF", "an HDF5 file", _SAVE_AS_TEXT),
        (rb"\x93NUMPY", "a numpy array", _SAVE_AS_TEXT),
        (rb"\x80[\x02-\x05]", "a Python pickle", f"pickles are not read; {_SAVE_AS_TEXT}"),
        (rb"SQLite format 3\x00", "an SQLite database", f"export the table: {_SAVE_AS_TEXT}"),
        (rb"%PDF-", "a PDF document", _SAVE_AS_TEXT),
        (
            rb"(?i)\s*<(!doctype )?html[\s>]",
            "a web page",
            "download the file itself; a link to a page or a login may stand before it",
        ),
        (
            rb"version https://git-lfs",
            "a pointer of Git LFS and not the file",
            "fetch it with `git lfs pull`",
        ),
    )
)
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    # Before UTF-16, whose mark is the beginning of this one.
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def read_content(path: Path, say: Say) -> bytes:
    """Read a file whole, and unpack it where it is compressed, whatever its name.

    Args:
        path: the file.
        say: is told where the name does not say so.

    Returns:
        What was compressed, or the file.

    Raises:
        DataError: if it is compressed and damaged.
    """
    content = path.read_bytes()
    for name, (magic, unpack) in _COMPRESSED.items():
        if not magic.match(content):
            continue
        try:
            content = unpack(content)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise DataError(
                f"{path}: a damaged {name} file: {error}", remedy="copy or write the file again"
            ) from error
        if path.suffix.lower() not in COMPRESSION_SUFFIXES:
            say(f"{path.name} is compressed with {name}, though its name does not say so")
        break
    return content


def foreign_format(content: bytes) -> tuple[str, str] | None:
    """Name a format that is not read, and the remedy; None where it may be text."""
    for magic, name, remedy in _FOREIGN:
        if magic.match(content):
            return name, remedy
    return None


def text_lines(path: Path, content: bytes, say: Say) -> list[str]:
    """Decode a text file and cut it into lines.

    Args:
        path: names the file.
        content: its bytes.
        say: is told of an encoding that was guessed.

    Returns:
        The lines without their ends: LF, CRLF, or CR in a file that has no LF.

    Raises:
        DataError: if it is no text in UTF-8, UTF-16 or UTF-32; with line and byte for UTF-8.
    """
    foreign = foreign_format(content)
    if foreign is not None:
        raise DataError(f"{path} is {foreign[0]}", remedy=foreign[1])
    encoding = _encoding(content)
    if encoding.endswith(("le", "be")):
        say(f"{path.name} was read as {encoding.upper()}, though it has no byte order mark")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if not encoding.startswith("utf-8"):
            raise DataError(
                f"{path}: invalid {encoding.upper()} at byte {error.start + 1}",
                remedy="write the file again, best in UTF-8",
            ) from error
        before = bytes(error.object[: error.start])
        byte = len(before) - before.rfind(b"\n")
        raise row_error(
            path,
            before.count(b"\n") + 1,
            f"invalid UTF-8 at byte {byte} of the line",
            "convert the file to UTF-8 from the encoding that it was saved in, for example: "
            f"iconv -f {_likely_encoding(content)} -t utf-8 {path.name}",
        ) from error
    if "\n" not in text.rstrip("\r\n"):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _likely_encoding(content: bytes) -> str:
    """Name an encoding for a remedy: in Latin-1 letters beyond ASCII mostly stand alone."""
    runs = re.findall(rb"[\x80-\xff]+", content)
    is_latin = 2 * sum(len(run) == 1 for run in runs) > len(runs)
    return "latin1" if is_latin else "gb18030 (or shift_jis, cp1251, ...)"


def _encoding(content: bytes) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return encoding
    sample = content[: min(_SAMPLE_BYTES, len(content) // 2 * 2)]
    if sample:
        # Most characters of most texts have a zero byte in UTF-16, and none has one in UTF-8.
        even, odd = (sample[start::2].count(0) / len(sample[start::2]) for start in (0, 1))
        if max(even, odd) > _MIN_ZERO_SHARE and min(even, odd) < _MIN_ZERO_SHARE / 2:
            return "utf-16-be" if even > odd else "utf-16-le"
    return "utf-8"
