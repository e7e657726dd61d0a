"""A model's shape without its weights: enough to count, cheap to build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_dist.errors import ConversionError
from moe_dist.inference.silence import quiet_transformers

UNTRUSTED = {"trust_remote_code": False}
"""Said to transformers, which would otherwise ask on the terminal whether to run a model's code."""


def build_skeleton(source: str, *, num_labels: int = 2, revision: str | None = None) -> Any:
    """Build a sequence classifier on the meta device from its configuration alone.

    Args:
        source: a directory, or a name on the Hugging Face hub.
        num_labels: outputs of the head.
        revision: hub commit, tag or branch.

    Returns:
        A model in evaluation mode whose parameters have shapes and no values.

    Raises:
        ConversionError: if the configuration cannot be read, or knows no classifier.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, revision=revision, **UNTRUSTED)
        config.num_labels = num_labels
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config).eval()
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        place = "directory" if Path(source).is_dir() else "hub model"
        raise ConversionError(
            f"model.teacher: the {place} {source!r} cannot be read: {first_line}",
            remedy="give a directory with config.json, model.safetensors and tokenizer files, "
            "the name of a hub model that this machine can reach, or package:NAME",
        ) from error
