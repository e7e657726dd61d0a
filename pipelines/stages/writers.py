"""Models that write texts, with the settings that they were measured with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..chain.stage import StageWork
    from ..chain.workspace import Workspace

MODELS = "models"
"""Their directory, in that of the stage evaluate."""


def write_as_measured(
    loaded: Mapping[str, Any],
    models: Mapping[str, tuple[Path, str]],
    workspace: Workspace,
    stage: StageWork,
) -> dict[str, Path]:
    """Write models once more whose own `generate()` is to write as it did here.

    Settings of a search may change without training anew, so that what was trained cannot hold
    them. Gives directories by `models/NAME`; none of models that write no texts.
    """
    from moe_dist.inference.generation import save_with_generation, set_generation

    written: dict[str, Path] = {}
    for part in workspace.rows.parts.values():
        for name, model in loaded.items():
            settings = part.task.task_kind.generation(model, part.task.options)
            if settings:
                set_generation(model, settings)
                directory = stage.directory / MODELS / name
                written[f"{MODELS}/{name}"] = save_with_generation(
                    model, models[name][0], directory
                )
    if written:
        shown = workspace.files.shown(stage.directory / MODELS)
        stage.console.note(f"models that write with the recipe's settings: {shown}")
    return written
