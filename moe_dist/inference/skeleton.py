"""A model's shape without its weights: enough to count, cheap to build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

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

    with clear_errors(source):
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, revision=revision, **UNTRUSTED)
        config.num_labels = num_labels
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config).eval()


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """Say which model cannot be loaded, and what to do about it.

    Args:
        source: a directory, or a name on the Hugging Face hub.

    Yields:
        While it is read.

    Raises:
        ConversionError: for what transformers raises.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = "directory" if Path(source).is_dir() else "hub model"
        raise ConversionError(
            f"model.teacher: the {kind} {source!r} cannot be loaded: {first_line}",
            remedy="give a directory with config.json, model.safetensors and tokenizer files, "
            "the name of a hub model that this machine can reach, or package:NAME",
        ) from error
