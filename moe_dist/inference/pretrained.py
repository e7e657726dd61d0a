"""A pre-trained encoder as the start of a classifier or regressor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moe_dist.errors import ConversionError
from moe_dist.inference.silence import quiet_transformers
from moe_dist.inference.skeleton import UNTRUSTED


def load_pretrained(
    source: str,
    *,
    num_labels: int,
    label_names: Sequence[str] | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Load an encoder with a sequence classification head, and its tokenizer.

    The head is drawn from the seed where the source has none of this size.

    Args:
        source: a directory, or a name on the Hugging Face hub.
        num_labels: outputs of the head; 1 with no label names means regression.
        label_names: class names in the order of their ids; None for regression.
        revision: hub commit, tag or branch.
        seed: of the head's weights.

    Returns:
        The model in float32 and training mode, and the tokenizer.

    Raises:
        ConversionError: if there is no such model or it cannot be read.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    names = [str(name) for name in label_names] if label_names is not None else None
    if names is not None and len(names) != num_labels:
        raise ConversionError(f"{num_labels} labels but {len(names)} label names")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, revision=revision, **UNTRUSTED)
            config.num_labels = num_labels
            config.problem_type = "regression" if names is None else "single_label_classification"
            if names is not None:
                config.id2label = dict(enumerate(names))
                config.label2id = {name: index for index, name in enumerate(names)}
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                revision=revision,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                # Without it transformers would read a pickle where there is nothing else.
                use_safetensors=True,
                **UNTRUSTED,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **UNTRUSTED)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        place = "directory" if Path(source).is_dir() else "hub model"
        raise ConversionError(
            f"model.teacher: the {place} {source!r} cannot be loaded: {first_line}",
            remedy="give a directory with config.json, model.safetensors and tokenizer files, "
            "the name of a hub model that this machine can reach, or package:NAME",
        ) from error
    return model.train(), tokenizer
