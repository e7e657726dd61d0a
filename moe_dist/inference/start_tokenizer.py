"""A start model's tokenizer."""

from __future__ import annotations

from typing import Any

from moe_dist.errors import ConversionError
from moe_dist.inference.silence import quiet_transformers
from moe_dist.inference.skeleton import UNTRUSTED


def read_tokenizer(source: str, revision: str | None = None) -> Any:
    """Read a start model's tokenizer.

    Args:
        source: a directory, or a name on the Hugging Face hub.
        revision: hub commit, tag or branch.

    Returns:
        The tokenizer.

    Raises:
        ConversionError: if it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source, revision=revision, **UNTRUSTED)
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"model.teacher: the tokenizer of {source!r} cannot be read: {first_line}",
            remedy="give a directory that holds the tokenizer's files too",
        ) from error
