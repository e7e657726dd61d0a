"""Read a checkpoint's tensors into an engine of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.distributed.checkpoint_files import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    RNG_FILE,
    STATE_FILE,
)
from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.gathering import named_state, own_experts
from moe_dist.distributed.manifest import read_json
from moe_dist.distributed.moments import MOMENTS
from moe_dist.distributed.parameter_groups import is_expert_slice
from moe_dist.errors import CheckpointError


def read_into(step_dir: Path, engine: TrainEngine) -> dict[str, Any]:
    """Set an engine's model, optimizer and random state; nothing is set unless all of it fits.

    Args:
        step_dir: a checkpoint whose files are known to be good.
        engine: of any size; each rank reads only its own experts.

    Returns:
        What `state.json` holds.

    Raises:
        CheckpointError: if the checkpoint is of another model.
    """
    saved = read_json(step_dir / STATE_FILE)
    named = list(named_state(engine.module))
    with _open(step_dir / MODEL_FILE) as file:
        _check_names(step_dir, {name for name, _ in named}, set(file.keys()))
        loaded = [_read_like(file, name, tensor, engine, step_dir) for name, tensor in named]
    moments: dict[str, Tensor] = {}
    with _open(step_dir / OPTIMIZER_FILE) as file:
        keys = set(file.keys())
        for name, parameter in engine.module.named_parameters():
            for moment in MOMENTS if parameter.requires_grad else ():
                key = f"{moment}.{name}"
                if not keys:
                    continue
                if key not in keys:
                    raise CheckpointError(
                        f"{step_dir / OPTIMIZER_FILE} has no {key}",
                        remedy="train the same parameters as the run that wrote it",
                    )
                moments[key] = _read_like(file, key, parameter, engine, step_dir)
    with torch.no_grad():
        for (_, tensor), value in zip(named, loaded, strict=True):
            tensor.copy_(value)
    engine.write_moments(moments or None, int(saved["optimizer_steps"]))
    if int(saved["world_size"]) == engine.world_size:
        _restore_rng(step_dir, engine)
    return saved


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", remedy="use another checkpoint"
        ) from error


def _check_names(step_dir: Path, wanted: set[str], present: set[str]) -> None:
    missing, extra = sorted(wanted - present), sorted(present - wanted)
    if missing or extra:
        shown = [f"missing {name}" for name in missing[:3]] + [f"extra {n}" for n in extra[:3]]
        raise CheckpointError(
            f"{step_dir} is of another model: {len(missing)} tensors missing, {len(extra)} extra "
            f"({', '.join(shown)})",
            remedy="load it with the model and settings that wrote it, or start in a new directory",
        )


def _read_like(file: Any, key: str, like: Tensor, engine: TrainEngine, step_dir: Path) -> Tensor:
    """Read a tensor, or this rank's experts of it, as the model's own tensor has them."""
    is_expert = is_expert_slice(like) and engine.ep_size > 1
    stored = file.get_slice(key)
    shape = list(stored.get_shape())
    expected = list(like.shape)
    if is_expert:
        expected[0] *= engine.ep_size
    if shape != expected:
        raise CheckpointError(
            f"{step_dir}: {key} has shape {shape}, the model needs {expected}",
            remedy="load it with the model and settings that wrote it, or start in a new directory",
        )
    if not is_expert:
        whole: Tensor = file.get_tensor(key)
        return whole
    return torch.cat([stored[expert : expert + 1] for expert in own_experts(engine, like)])


def _restore_rng(step_dir: Path, engine: TrainEngine) -> None:
    with _open(step_dir / RNG_FILE) as file:
        keys = set(file.keys())
        cpu, cuda = f"rank.{engine.rank}.cpu", f"rank.{engine.rank}.cuda"
        if cpu in keys:
            torch.set_rng_state(file.get_tensor(cpu))
        if cuda in keys and engine.device.type == "cuda":
            torch.cuda.set_rng_state(file.get_tensor(cuda), engine.device)
