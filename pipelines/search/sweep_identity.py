"""Which sweep a directory holds: one goes on only with trials of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_dist.config import RunConfig
from moe_dist.config.setting_kinds import settings_of_kind
from moe_dist.errors import MoeDistError
from moe_dist.whole_files import write_json

from ..chain.fingerprints import value_digest
from ..chain.workspace import Workspace

SWEEP_NAME = "sweep.json"
# They change how long a sweep goes on and how it is watched, but not what its trials are.
_OPEN_KEYS = (
    "num_trials",
    "time_budget_s",
    "worker_budget_s",
    "max_concurrent",
    "baseline",
    "confirm_seeds",
)


def open_sweep(workspace: Workspace, directory: Path) -> float:
    """See that the directory is free or holds this sweep, and give the seconds it took so far."""
    identity = _identity(workspace.config, workspace)
    directory.mkdir(exist_ok=True)
    path = directory / SWEEP_NAME
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if known.get("identity") != identity:
            raise MoeDistError(
                f"{workspace.files.shown(directory)} holds the trials of another search: its "
                "space, its recipe or its data were not these.",
                remedy="choose another `name` with --set name=NAME, or move that directory away. "
                f"Only {', '.join(f'search.{key}' for key in _OPEN_KEYS)} may differ.",
            )
        return float(known.get("seconds", 0.0))
    write_json(path, {"identity": identity, "seconds": 0.0})
    # Another machine must not take the trials for those of another search.
    workspace.files.publish(directory)
    return 0.0


def note_sweep(config: RunConfig, workspace: Workspace, directory: Path, seconds: float) -> None:
    """Note how long the sweep took so far, in seconds."""
    identity = _identity(config, workspace)
    write_json(directory / SWEEP_NAME, {"identity": identity, "seconds": round(seconds, 3)})


def _identity(config: RunConfig, workspace: Workspace) -> str:
    """Say which sweep this is: continuing another one's trials would mix two searches."""
    settings = settings_of_kind(config)
    search = config.search.model_dump(mode="json", exclude=set(_OPEN_KEYS))
    return value_digest([settings, search, workspace.splits.digest, workspace.start_model_digest])
