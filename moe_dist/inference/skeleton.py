"""A model's shape without its weights: enough to count, cheap to build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moe_dist.errors import ConversionError, MoeDistError
from moe_dist.inference.silence import quiet_transformers
from moe_dist.tasks import TASK_KINDS, TaskKind

UNTRUSTED = {"trust_remote_code": False}
"""Said to transformers, which would otherwise ask on the terminal whether to run a model's code."""

_SHOWN_CHARACTERS = 300


def build_skeleton(
    source: str,
    *,
    kind: TaskKind | None = None,
    num_labels: int = 2,
    revision: str | None = None,
) -> Any:
    """Build a model in eval mode on the meta device, from its configuration alone.

    Args:
        source: a directory, or a name on the Hugging Face hub.
        kind: of the task; classification if None.
        num_labels: outputs of a head that belongs to the task.
        revision: hub commit, tag or branch.

    Returns:
        The model.

    Raises:
        ConversionError: if the configuration cannot be read, or its family has no model for such
            tasks.
    """
    from transformers import AutoConfig

    kind = kind or TASK_KINDS["classification"]
    with clear_errors(source), quiet_transformers():
        config = AutoConfig.from_pretrained(source, revision=revision, **UNTRUSTED)
        if num_labels:
            config.num_labels = num_labels
        with torch.device("meta"):
            auto = model_class_for(kind, config, source)
            return auto.from_config(config, **constructor_arguments(kind, auto, config)).eval()


def model_class_for(kind: TaskKind, config: Any, source: str) -> Any:
    """Give the Auto class that loads a family's model for a kind of task.

    A family that has none is a ConversionError: an encoder writes no text.
    """
    import transformers

    auto = getattr(transformers, kind.auto_class)
    remedy = f"choose {_models_for(kind)}, or another kind of task"
    if type(config) not in auto._model_mapping:
        raise ConversionError(
            f"model.teacher: {source!r} is of the family {config.model_type}, which has no model "
            f"for data.kind={kind.name}",
            remedy=remedy,
        )
    is_encoder = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    if is_encoder and not config.is_encoder_decoder and not kind.takes_encoders:
        raise ConversionError(
            f"model.teacher: {source!r} is an encoder ({config.model_type}), whose tokens see the "
            f"later ones, and data.kind={kind.name} is to predict these",
            remedy=remedy,
        )
    if config.is_encoder_decoder and not kind.takes_encoder_decoders:
        raise ConversionError(
            f"model.teacher: {source!r} is an encoder-decoder, and data.kind={kind.name} takes "
            "models of one stack",
            remedy=remedy,
        )
    return auto


def _models_for(kind: TaskKind) -> str:
    if kind.writes:
        return "an encoder-decoder, such as one of T5's or BART's kind"
    if not kind.takes_encoders:
        return "a decoder, such as one of GPT-2's or Llama's kind"
    return "another model" if kind.takes_encoder_decoders else "an encoder or a decoder"


def constructor_arguments(kind: TaskKind, auto: Any, config: Any) -> dict[str, Any]:
    """Give what an Auto class passes on to the model's class beside a configuration."""
    import inspect

    model_class = auto._model_mapping[type(config)]
    return kind.model_arguments(list(inspect.signature(model_class.__init__).parameters))


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
