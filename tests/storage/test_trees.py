"""Directories in a real S3 protocol: whole or not visible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from moe_dist.errors import StorageError
from moe_dist.storage import (
    MANIFEST,
    Store,
    delete_tree,
    download_tree,
    local_file,
    move_tree,
    upload_tree,
)


def write_tree(directory: Path, content: str) -> Path:
    (directory / "deep").mkdir(parents=True, exist_ok=True)
    (directory / "weights").write_text(content)
    (directory / "deep" / "part").write_text(content * 2)
    (directory / MANIFEST).write_text(f"manifest of {content}")
    return directory


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text() for path in files}


def test_small_files_are_written_listed_read_and_deleted(s3: str) -> None:
    store = Store(f"{s3}/a/b")
    store.write("one.json", b"1")
    store.at("deep").write("two.json", b"22")
    assert [(entry.name, entry.size) for entry in store.list()] == [
        ("deep/two.json", 2),
        ("one.json", 1),
    ]
    assert [entry.name for entry in store.list("deep")] == ["deep/two.json"]
    assert store.read("one.json") == b"1"
    assert store.read("none.json") is None
    assert store.list("none") == []
    store.delete(["one.json", "none.json"])
    assert store.read("one.json") is None
    with local_file(f"{s3}/a/b/deep/two.json") as path:
        assert (path.name, path.read_bytes()) == ("two.json", b"22")
    assert not path.exists()


def test_a_tree_comes_back_as_it_went(s3: str, tmp_path: Path) -> None:
    store, local = Store(s3), write_tree(tmp_path / "model", "x")
    upload_tree(store, local, "run/model")
    download_tree(store, "run/model", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(local)

    # What replaces it leaves nothing of it behind.
    (local / "weights").unlink()
    (local / "other").write_text("y")
    upload_tree(store, local, "run/model")
    download_tree(store, "run/model", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(local)

    move_tree(store, "run/model", "run/moved")
    assert [entry.name for entry in store.list("run/model")] == []
    download_tree(store, "run/moved", tmp_path / "moved")
    assert contents(tmp_path / "moved") == contents(local)

    delete_tree(store, "run/moved")
    with pytest.raises(StorageError, match="is not there"):
        download_tree(store, "run/moved", tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_the_query_of_a_uri_names_endpoint_and_region(
    s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = s3_server.removeprefix("http://")
    store = Store(f"{s3}/a?endpoint_override={host}&scheme=http&region=us-east-1")
    store.at("b").write("one", b"1")
    assert store.read("b/one") == b"1"
    assert [entry.name for entry in store.list()] == ["b/one"]


UPLOAD = """
import os, sys, time
from pathlib import Path
from moe_dist.storage import Store, upload_tree

class Slow(Store):
    def upload(self, pairs):
        for pair in pairs:
            super().upload([pair])
            print("sent", pair[1], flush=True)
            time.sleep(0.3)

print("ready", flush=True)
upload_tree(Slow(sys.argv[1]), Path(sys.argv[2]), "model")
print("done", flush=True)
"""


@pytest.mark.parametrize("sent_before_the_kill", [0, 1, 2])
def test_a_killed_upload_shows_the_old_tree_or_none(
    s3: str, tmp_path: Path, sent_before_the_kill: int
) -> None:
    store = Store(s3)
    upload_tree(store, write_tree(tmp_path / "old", "old"), "model")
    new = write_tree(tmp_path / "new", "new" * 1000)
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, s3, str(new)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(1 + sent_before_the_kill):
        process.stdout.readline()
    if sent_before_the_kill == 0:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)

    with suppress(StorageError):
        download_tree(store, "model", tmp_path / "seen")
    seen = contents(tmp_path / "seen") if (tmp_path / "seen").exists() else None
    assert seen in (None, contents(tmp_path / "old"))
    assert sent_before_the_kill == 0 or seen is None

    upload_tree(store, new, "model")
    download_tree(store, "model", tmp_path / "seen")
    assert contents(tmp_path / "seen") == contents(new)
