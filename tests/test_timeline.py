"""Marks are written only where they are asked for, and read back in the order of time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dist.timeline import VARIABLE, mark, read_marks


def test_nothing_is_noted_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    mark("Ray")
    assert list(tmp_path.iterdir()) == []


def test_marks_come_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timeline.jsonl"
    monkeypatch.setenv(VARIABLE, str(path))
    for event in ("recipe", "Ray", "Ray"):
        mark(event)
    events = read_marks(path)
    assert [event for event, _ in events] == ["recipe", "Ray"]
    assert events[0][1] <= events[1][1]


def test_other_ranks_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    lines = [("step", 3.0, "1"), ("step", 4.0, "0"), ("Ray", 2.0, "")]
    path.write_text(
        "".join(json.dumps({"event": e, "time": t, "rank": r}) + "\n" for e, t, r in lines)
    )
    assert read_marks(path) == [("Ray", 2.0), ("step", 4.0)]
