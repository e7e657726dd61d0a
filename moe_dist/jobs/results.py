"""What jobs leave in a stage's directory, and how stages read it back. No pickles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from moe_dist.errors import CheckpointError
from moe_dist.whole_files import whole_file

MODEL_DIR = "model"
CHECKPOINT_DIR = "checkpoints"
RESULT = "result.json"
SCORES = "scores.safetensors"
PREDICTIONS = "predictions.npz"


@dataclass(frozen=True)
class SavedPredictions:
    """A model's answers on one split.

    Args:
        logits: (N, C) float32.
        predictions: (N,) class ids, or floats in regression.
        labels: (N,) of the same kind.
        sample_ids: (N,) ids of the samples.
        texts: (N,) of text, where the answers are some.
    """

    logits: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    texts: np.ndarray | None = None


def save_scores(scores: Sequence[Tensor], path: Path) -> None:
    """Write importance scores, (F,) for each FFN in the model's order, whole or not at all."""
    named = {f"{index:04d}": score.contiguous().cpu() for index, score in enumerate(scores)}
    with whole_file(path) as beside:
        # Not `save_file`, which lets none but the owner read; stages are shared.
        beside.write_bytes(save(named))


def load_scores(path: Path) -> list[Tensor]:
    """Read what `save_scores` wrote; a missing or damaged file is a CheckpointError."""
    try:
        named = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"importance scores {path} cannot be read: {error}",
            remedy="delete the stage's directory and run score-importance again",
        ) from error
    return [named[name].to(torch.float32) for name in sorted(named)]


def save_predictions(
    path: Path,
    *,
    logits: Any,
    predictions: Any,
    labels: Any,
    sample_ids: Any,
    texts: Sequence[str] | None = None,
) -> None:
    """Write arrays of numpy's or torch's as ``.npz``, whole or not at all.

    They are logits (N, C), and predictions, labels, ids and texts (N,).
    """
    arrays = {
        "logits": logits,
        "predictions": predictions,
        "labels": labels,
        "sample_ids": sample_ids,
    }
    if texts is not None:
        # A type of fixed width: an array of objects would be a pickle.
        arrays["texts"] = np.asarray(texts, np.str_)
    with whole_file(path) as beside, beside.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **{k: np.asarray(v) for k, v in arrays.items()})


def load_predictions(path: Path) -> SavedPredictions:
    """Read what `save_predictions` wrote; a missing or damaged file is a CheckpointError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return SavedPredictions(
                arrays["logits"],
                arrays["predictions"],
                arrays["labels"],
                arrays["sample_ids"],
                arrays["texts"] if "texts" in arrays.files else None,
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"predictions {path} cannot be read: {error}",
            remedy="delete the stage's directory and run evaluate again",
        ) from error
