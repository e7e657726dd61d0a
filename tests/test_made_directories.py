"""What was made for nothing goes away again, and what was there before stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.made_directories import MadeDirectories


def test_only_what_was_made_is_removed(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    made = MadeDirectories()
    made.make(there / "new/newer")
    made.remove_if_empty()
    assert list(tmp_path.rglob("*")) == [there]


def test_a_directory_that_holds_something_stays_with_those_above_it(tmp_path: Path) -> None:
    made = MadeDirectories()
    made.make(tmp_path / "new/newer")
    (tmp_path / "new/result").write_text("kept")
    made.remove_if_empty()
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new/result"]


def test_those_above_go_also_where_the_lowest_is_gone_already(tmp_path: Path) -> None:
    made = MadeDirectories()
    made.make(tmp_path / "new/newer")
    (tmp_path / "new/newer").rmdir()
    made.remove_if_empty()
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        MadeDirectories().make(tmp_path / "file/new")
