"""Dev rows of a file of their own that nearly repeat training rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.data import dev_copies
from moe_dist.data.dev_copies import num_near_copies
from tests.data.test_summary import load

TEXT = "the {} and the cast of this long film about a war were all in all quite {} to look at"
TRAIN = [(TEXT.format("plot", word), label) for word, label in (("fine", "a"), ("dull", "b"))]


def test_near_copies_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dev = [(TEXT.format("plots", "fine"), "a"), TRAIN[1], ("something else", "b")]
    splits = load(tmp_path, TRAIN, dev)
    assert num_near_copies(splits, tmp_path / "cache") == 1
    summary = splits.summary.with_near_copies(1)
    assert "1 more of 3 dev rows are near copies of training rows" in summary.warnings[-1]
    assert splits.summary.with_near_copies(0) is splits.summary
    monkeypatch.setattr(dev_copies, "find_repeats", None)
    assert num_near_copies(splits, tmp_path / "cache") == 1


def test_rows_that_were_held_out_have_none(tmp_path: Path) -> None:
    rows = [(f"a film about {word}", "ab"[i % 2]) for i, word in enumerate("uvwxyz")]
    assert num_near_copies(load(tmp_path, rows, dev_size=2), tmp_path / "cache") == 0
    assert not (tmp_path / "cache").exists()
