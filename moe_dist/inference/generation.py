"""What `generate()` of a saved model does where its caller says nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_dist.inference.saving import MANIFEST, model_directory, write_manifest


def set_generation(model: Any, settings: Mapping[str, Any]) -> None:
    """Let a model write by these settings; of its own ones those that name tokens stay."""
    from transformers import GenerationConfig

    own = model.generation_config.to_diff_dict()
    tokens = {name: value for name, value in own.items() if name.endswith("_token_id")}
    model.generation_config = GenerationConfig(**{**tokens, **settings})


def save_with_generation(model: Any, source: Path, target: Path) -> Path:
    """Write a model's directory once more, with the generation settings that it has now.

    Args:
        model: which `source` holds, but for these settings.
        source: what `save_model` wrote; it stays as it is.
        target: where to; what is there is replaced. Weights are hard links where they can be, and
            take no more space.

    Returns:
        `target`.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with model_directory(target) as unfinished:
        shutil.copytree(source, unfinished, copy_function=_link_weights, dirs_exist_ok=True)
        model.generation_config.save_pretrained(unfinished)
        write_manifest(unfinished, json.loads((source / MANIFEST).read_text(encoding="utf-8")))
    return target


def _link_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:
            # Another file system, or one without links.
            pass
    shutil.copyfile(source, target)
