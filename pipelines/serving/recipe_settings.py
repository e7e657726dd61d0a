"""What the recipe of a run says about how its models answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_dist.errors import MissingInputError
from moe_dist.uris import is_uri

from ..checks.sizes import recipe_options
from ..report.report import JSON_NAME
from ..report.run_summary import read_json
from ..stages import distill, finetune_teacher
from ..stages.compaction import find_recipe

_NAMES = {finetune_teacher.NAME: "teacher", distill.NAME: "student"}
"""What reports call the models of these stages."""


def recipe_settings(directory: str, task: str | None) -> tuple[dict[str, Any], str]:
    """Find how a run's model was trained and measured to answer.

    Args:
        directory: of the model.
        task: of several, the one to answer.

    Returns:
        `max_length`, `options` and `calibration` as far as they are known, none without a recipe
        above the directory; and a line that says where they come from.
    """
    from moe_dist.config import load_config

    try:
        if is_uri(directory):
            raise MissingInputError("no recipe is looked for in a bucket")
        path = find_recipe(Path(directory))
    except MissingInputError:
        return {}, "no recipe lies above the model: length and options are the usual ones"
    config = load_config(path)
    found: dict[str, Any] = {
        "max_length": config.model.max_length,
        "options": recipe_options(config),
    }
    entry = read_json(path.parent / JSON_NAME).get(_model_name(path.parent, Path(directory)), {})
    calibration = entry.get("calibrations", {}).get(task or "")
    if calibration is not None:
        found["calibration"] = calibration
    return found, f"length and options are those of {path}"


def _model_name(run: Path, directory: Path) -> str:
    """What the run's report calls a model; empty if it does not."""
    parts = directory.absolute().relative_to(run.absolute()).parts
    if parts[:1] == ("compare",):
        return parts[1] if parts[2:3] == (distill.NAME,) else ""
    return _NAMES.get(parts[0], "")
