"""What jobs leave in a stage's directory, and how stages read it back. No pickles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    save_tensors({f"{index:04d}": score for index, score in enumerate(scores)}, path)


def load_scores(path: Path) -> list[Tensor]:
    """Read what `save_scores` wrote; a missing or damaged file is a CheckpointError."""
    named = load_tensors(path, what="importance scores", stage="score-importance")
    return [named[name].to(torch.float32) for name in sorted(named)]


def save_tensors(named: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name, whole or not at all."""
    held = {name: tensor.contiguous().cpu() for name, tensor in named.items()}
    with whole_file(path) as beside:
        # Not `save_file`, which lets none but the owner read; stages are shared.
        beside.write_bytes(save(held))


def load_tensors(path: Path, *, what: str, stage: str) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote; a missing or damaged file is a CheckpointError.

    It says `what` they are, and which `stage` to run again.
    """
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{what} {path} cannot be read: {error}",
            remedy=f"delete the stage's directory and run {stage} again",
        ) from error


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
