"""Models that write texts, with the settings that they were measured with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chain.fingerprints import MANIFEST

if TYPE_CHECKING:
    from moe_dist.data.sources import Splits

    from ..chain.files import ResultFiles
    from ..chain.stage import StageResult
    from ..chain.workspace import Workspace

MODELS = "models"
"""Their directory, in that of the stage evaluate."""


def writes_texts(workspace: Workspace) -> bool:
    """Whether models of this run write texts, and so by settings of a search."""
    return bool(_writing_parts(workspace))


def written_model(evaluated: StageResult, name: str) -> Path:
    """Where the stage evaluate keeps a model that writes by the recipe's settings."""
    return evaluated.directory / MODELS / name


def write_as_measured(
    loaded: Mapping[str, Any],
    models: Mapping[str, tuple[Path, str]],
    workspace: Workspace,
    directory: Path,
) -> None:
    """Write models once more whose own `generate()` is to write as it did here.

    Settings of a search may change without training anew, so that what was trained cannot hold
    them. They lie in `models/NAME` of the stage's `directory`; none of models that write no texts.
    """
    from moe_dist.inference.generation import save_with_generation, set_generation

    if not writes_texts(workspace):
        return
    for part in _writing_parts(workspace):
        for name, model in loaded.items():
            set_generation(model, part.task.task_kind.generation(model, part.task.options))
            save_with_generation(model, models[name][0], directory / MODELS / name)
    shown = workspace.files.shown(directory / MODELS)
    workspace.console.note(f"models that write with the recipe's settings: {shown}")


def restore_written(
    evaluated: StageResult, models: Mapping[str, tuple[Path, str]], workspace: Workspace
) -> None:
    """Write again what has gone of an evaluation's models: measuring them anew is not needed."""
    from moe_dist.inference import load_model

    if not writes_texts(workspace):
        return
    files = workspace.files
    lost = [name for name in models if not _is_whole(written_model(evaluated, name), files)]
    if not lost:
        return
    names = ", ".join(f"{MODELS}/{name}" for name in lost)
    workspace.console.warn(f"{evaluated.stage}: files of {names} are missing; written again")
    loaded = {name: load_model(files.fetch(models[name][0])) for name in lost}
    for name in lost:
        files.removed(written_model(evaluated, name))
    write_as_measured(loaded, models, workspace, evaluated.directory)
    files.publish(evaluated.directory / MODELS)


def _writing_parts(workspace: Workspace) -> list[Splits]:
    return [part for part in workspace.rows.parts.values() if part.task.task_kind.writes]


def _is_whole(directory: Path, files: ResultFiles) -> bool:
    """Whether a model has its manifest, and all files that this lists at their size."""
    return files.digest_if_whole(directory) is not None and (directory / MANIFEST).is_file()
