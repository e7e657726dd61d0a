"""Places named by URIs."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.uris import absolute_sqlite, sqlite_path


@pytest.mark.parametrize("name", ["plain", "x #1", "a%20b", "what?", "me@home", "100 %"])
def test_a_relative_database_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    uri = absolute_sqlite("sqlite:///runs/mlflow.db?timeout=5")
    assert uri.endswith("/runs/mlflow.db?timeout=5")
    assert sqlite_path(uri) == str(tmp_path / name / "runs/mlflow.db")
    assert absolute_sqlite(uri) == uri


def test_other_databases_stay_as_they_are() -> None:
    for uri in ("sqlite:///:memory:", "sqlite://", "postgresql://u@h/x", "http://h:1"):
        assert absolute_sqlite(uri) == uri
        assert sqlite_path(uri) in (None, ":memory:")
    assert sqlite_path("sqlite+pysqlite:////a/b.db") == "/a/b.db"
