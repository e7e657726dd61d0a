from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.data.cache import build_once, default_cache_dir
from moe_dist.errors import DataError


def always(_: Path) -> bool:
    return True


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "first").write_text("x")
        (folder / "second").symlink_to("/dev/full")
        (folder / "second").write_text("does not fit")

    with pytest.raises(DataError, match="no space left on the disk of") as caught:
        build_once(tmp_path / "entry", build, is_good=always)
    assert "MOE_DIST_CACHE" in caught.value.remedy
    assert names(tmp_path) == set()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_damaged_entry_stays_until_it_can_be_replaced(tmp_path: Path, number: int) -> None:
    (tmp_path / "entry").mkdir()

    def build(folder: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(DataError, match="no space left"):
        build_once(tmp_path / "entry", build, is_good=lambda _: False)
    assert names(tmp_path) == {"entry"}


def test_failure_of_the_builder_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        build_once(tmp_path / "entry", fail, is_good=always)
    assert names(tmp_path) == set()
    build_once(tmp_path / "entry", lambda f: (f / "a").touch(), is_good=always)
    assert (tmp_path / "entry" / "a").exists()


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    old, new = tmp_path / ".entry.building-old", tmp_path / ".entry.building-new"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    build_once(tmp_path / "entry", lambda f: (f / "a").touch(), is_good=always)
    assert names(tmp_path) == {"entry", new.name}


def test_what_a_process_of_this_machine_left_is_cleared_at_once(tmp_path: Path) -> None:
    killed = """
import os, sys
from pathlib import Path
from moe_dist.data.cache import build_once
build_once(Path(sys.argv[1]), lambda folder: os.kill(os.getpid(), 9), is_good=lambda _: False)
"""
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "entry")], check=False)
    (left,) = names(tmp_path)
    assert left.startswith(".entry.building-")
    elsewhere = ".entry.building-1999999999-another-host-abc"
    (tmp_path / elsewhere).mkdir()
    kept = f".entry.building-{os.getpid()}-{left.split('-', 2)[2]}"
    (tmp_path / kept).mkdir()
    build_once(tmp_path / "entry", lambda f: (f / "a").touch(), is_good=always)
    assert names(tmp_path) == {"entry", elsewhere, kept}


def test_other_errors_pass(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    with pytest.raises(OSError, match="input/output"):
        build_once(tmp_path / "entry", build, is_good=always)


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("MOE_DIST_CACHE", raising=False)
    assert default_cache_dir() == Path("/xdg/moe-dist")
    monkeypatch.setenv("MOE_DIST_CACHE", "/mine")
    assert default_cache_dir() == Path("/mine")
