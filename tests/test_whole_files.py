"""A file that is written beside its place is there whole, or the old one is."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from moe_dist.whole_files import whole_directory, whole_file, write_json


@pytest.mark.parametrize("durable", [False, True])
def test_the_file_takes_its_place_in_the_end(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "note.json"
    for text in ("first", "second"):
        with whole_file(path, durable=durable) as beside:
            beside.write_text(text, encoding="utf-8")
            assert beside.parent == path.parent
            assert not path.exists() or path.read_text(encoding="utf-8") == "first"
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as beside:
        beside.write_text("ha\ud800", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    for name in ("first", "second"):
        with whole_directory(target) as beside:
            (beside / "inner").mkdir()
            (beside / "inner" / name).write_text(name)
            assert beside.parent == target.parent
        assert [path.name for path in (target / "inner").iterdir()] == [name]
    with pytest.raises(UnicodeEncodeError), whole_directory(target) as beside:
        (beside / "half").write_text("ha\ud800", encoding="utf-8")
    assert [path.name for path in (target / "inner").iterdir()] == ["second"]
    assert list(target.parent.iterdir()) == [target]


def test_a_linked_file_keeps_its_mode(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("weights")
    source.chmod(0o600)
    with whole_directory(tmp_path / "linked") as unfinished:
        os.link(source, unfinished / "own")
        (unfinished / "new").write_text("more")
    assert stat.S_IMODE(source.stat().st_mode) == 0o600
    assert (tmp_path / "linked" / "own").samefile(source)
    assert stat.S_IMODE((tmp_path / "linked" / "new").stat().st_mode) & 0o400


def test_json_replaces_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": 1})
    write_json(tmp_path / "r.json", {"b": [1.5], "a": tmp_path})
    text = (tmp_path / "r.json").read_text()
    assert text.split() == ["{", '"b":', "[", "1.5", "],", '"a":', f'"{tmp_path}"', "}"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_json_holds_no_credentials_and_no_guesses(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"uri": "s3://me:secret@bucket/x"})
    assert json.loads((tmp_path / "r.json").read_text()) == {"uri": "s3://***@bucket/x"}
    with pytest.raises(TypeError):
        write_json(tmp_path / "r.json", {"a": object()})
