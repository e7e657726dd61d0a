"""A model's shape without its weights: enough to count, cheap to build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moe_dist.errors import ConversionError, MoeDistError
from moe_dist.inference.silence import quiet_transformers

UNTRUSTED = {"trust_remote_code": False}
"""Said to transformers, which would otherwise ask on the terminal whether to run a model's code."""

_SHOWN_CHARACTERS = 300


def build_skeleton(source: str, *, num_labels: int = 2, revision: str | None = None) -> Any:
    """Build a sequence classifier in eval mode on the meta device, from its configuration alone.

    `source` is a directory or a name on the Hugging Face hub, `revision` a commit, tag or branch.
    A configuration that cannot be read, or knows no classifier, is a ConversionError.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with clear_errors(source), quiet_transformers():
        config = AutoConfig.from_pretrained(source, revision=revision, **UNTRUSTED)
        config.num_labels = num_labels
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config).eval()


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """Turn what calls of transformers inside the block raise into a ConversionError of one line."""
    try:
        yield
    except MoeDistError:
        raise
    # A wrong entry of a config.json comes back as almost any error, from StrictDataclassError to
    # AssertionError.
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, (OSError, ValueError)):
            text = f"{type(error).__name__}: {text}"
        place = "directory" if Path(source).is_dir() else "hub model"
        raise ConversionError(
            f"model.teacher: the {place} {source!r} cannot be loaded: {text[:_SHOWN_CHARACTERS]}",
            remedy="give a directory with config.json, model.safetensors and tokenizer files, "
            "the name of a hub model that this machine can reach, or package:NAME",
        ) from error
