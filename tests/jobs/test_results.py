"""Files that jobs leave."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.errors import CheckpointError
from moe_dist.jobs.results import (
    load_predictions,
    load_scores,
    save_predictions,
    save_scores,
)


def test_scores_keep_their_order(tmp_path: Path) -> None:
    scores = [torch.full((3,), float(layer)) for layer in range(12)]
    save_scores(scores, tmp_path / "new" / "scores.safetensors")
    back = load_scores(tmp_path / "new" / "scores.safetensors")
    assert [score[0].item() for score in back] == list(range(12))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["scores.safetensors"]


def test_scores_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_scores([torch.ones(2)], tmp_path / "scores.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "scores.safetensors").stat().st_mode & 0o777 == 0o644


def test_predictions_come_back(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    save_predictions(
        path,
        logits=torch.eye(2),
        predictions=torch.tensor([0, 1]),
        labels=np.array([1, 1]),
        sample_ids=[7, 9],
    )
    saved = load_predictions(path)
    assert saved.logits.dtype == np.float32 and saved.logits.tolist() == [[1, 0], [0, 1]]
    assert (saved.predictions.tolist(), saved.labels.tolist()) == ([0, 1], [1, 1])
    assert saved.sample_ids.tolist() == [7, 9]


@pytest.mark.parametrize("load", [load_scores, load_predictions])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, load: object) -> None:
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match=str(path)):
        load(path)  # type: ignore[operator]
    path.write_bytes(b"not what it should be")
    with pytest.raises(CheckpointError, match=str(path)):
        load(path)  # type: ignore[operator]


def test_pickled_predictions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    np.savez(path, logits=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_predictions(path)
