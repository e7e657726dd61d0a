"""Canonical checkpoints: whole tensors by name, loadable at any world, ep_size and ZeRO stage.

    <directory>/step-00000120/
        model.safetensors      parameters and buffers, experts in global order
        optimizer.safetensors  exp_avg.<name> and exp_avg_sq.<name>
        rng.safetensors        rank.<r>.cpu, rank.<r>.cuda
        state.json             step, optimizer steps, sizes of the run, the caller's own state
        manifest.json          SHA-256 of each file and of each expert

Nothing is pickled. A checkpoint is written beside its place and renamed when complete, so a
killed writer leaves the older ones as they were.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.gathering import gather_experts, named_state, slice_of
from moe_dist.distributed.manifest import (
    FORMAT_VERSION,
    check_manifest,
    expert_digests,
    flush_to_disk,
    read_json,
    write_json,
    write_manifest,
)
from moe_dist.distributed.moments import MOMENTS
from moe_dist.distributed.parameter_groups import is_expert_slice, moe_layers
from moe_dist.errors import CheckpointError, MoeDistError

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "state.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED_PREFIX = ".unfinished-"

T = TypeVar("T")


def save_checkpoint(
    directory: Path, engine: TrainEngine, *, step: int, state: dict[str, Any], keep: int = 2
) -> Path:
    """Write a checkpoint; all ranks call it together, rank 0 writes.

    Older checkpoints beyond the newest `keep` are removed, and so are those of later steps, which
    belong to a course of training that was left.

    Args:
        directory: holds the checkpoints of one run; on storage that all ranks see.
        engine: whose model and optimizer are saved.
        step: number of the step, for the name.
        state: the caller's own plain values (epoch, position, ...), returned by the load.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: on every rank, if it could not be written; nothing half-written stays.
    """
    directory = Path(directory)
    place = directory / f"step-{step:08d}"
    model = _gather_model(engine)
    moments = _gather_moments(engine)
    rng = _gather_rng(engine)

    def write() -> None:
        sizes = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "optimizer_steps": engine.steps_done,
            "world_size": engine.world_size,
            "ep_size": engine.ep_size,
            "zero_stage": engine.zero_stage,
            "state": state,
        }
        layers = {
            name: [f"{name}.experts.{leaf}" for leaf, _ in layer.experts.named_parameters()]
            for name, layer in moe_layers(engine.module)
        }
        tensors = {MODEL_FILE: model, OPTIMIZER_FILE: moments, RNG_FILE: rng}
        _write_directory(place, tensors, sizes, expert_digests(model, layers))
        _prune(directory, step, keep)

    _on_rank_zero(engine, write)
    return place


def load_checkpoint(directory: Path, engine: TrainEngine) -> dict[str, Any] | None:
    """Load a checkpoint, written at whatever size; all ranks call it together.

    Args:
        directory: a checkpoint, or a directory of checkpoints, of which the newest good one is
            taken; damaged ones are named in a warning.
        engine: whose model and optimizer are set.

    Returns:
        The caller's state as it was saved, with `step` in it; None if there is no checkpoint.

    Raises:
        CheckpointError: if the named checkpoint is damaged, if all are, or if it is of another
            model.
    """
    directory = Path(directory)
    chosen = _on_rank_zero(engine, lambda: _choose(directory))
    if chosen is None:
        return None
    saved = _on_every_rank(engine, lambda: _read_into(Path(chosen), engine))
    return {**saved["state"], "step": saved["step"]}


def verify_checkpoint(step_dir: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Args:
        step_dir: the checkpoint's directory.

    Raises:
        CheckpointError: naming the missing, damaged or unsafe file.
    """
    step_dir = Path(step_dir)
    if not step_dir.is_dir():
        raise CheckpointError(f"{step_dir} is not a checkpoint", remedy="check the path")
    check_manifest(step_dir)


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, newest first.

    Args:
        directory: as given to `save_checkpoint`.

    Returns:
        Their directories; none if there are none.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _step_of(path) is not None]
    return sorted(found, key=lambda path: _step_of(path) or 0, reverse=True)


def _step_of(path: Path) -> int | None:
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def _choose(directory: Path) -> str | None:
    if _step_of(directory) is not None:
        verify_checkpoint(directory)
        return str(directory)
    faults = []
    for path in list_checkpoints(directory):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            faults.append(error.message)
            logger.warning("%s; trying the checkpoint before it", error.message)
        else:
            return str(path)
    if faults:
        raise CheckpointError(
            f"no checkpoint in {directory} is good: " + "; ".join(faults),
            remedy=f"delete {directory} to train from the start",
        )
    return None


def _gather_model(engine: TrainEngine) -> dict[str, Tensor]:
    gathered = {}
    for name, tensor in named_state(engine.module):
        whole = gather_experts(engine, tensor, is_expert=is_expert_slice(tensor))
        if engine.rank == 0:
            gathered[name] = whole
    return gathered


def _gather_moments(engine: TrainEngine) -> dict[str, Tensor]:
    experts = {name for name, p in engine.module.named_parameters() if is_expert_slice(p)}
    gathered = {}
    for key, moment in sorted(engine.read_moments().items()):
        name = key.partition(".")[2]
        whole = gather_experts(engine, moment, is_expert=name in experts)
        if engine.rank == 0:
            gathered[key] = whole
    return gathered


def _gather_rng(engine: TrainEngine) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    gathered = {}
    for kind, mine in states.items():
        parts = [mine]
        if engine.world_size > 1:
            # NCCL carries tensors of the device only.
            local = mine.to(engine.device)
            parts = [torch.empty_like(local) for _ in range(engine.world_size)]
            dist.all_gather(parts, local)
        gathered.update({f"rank.{rank}.{kind}": part.cpu() for rank, part in enumerate(parts)})
    return gathered


def _write_directory(
    place: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    state: Mapping[str, Any],
    experts: Mapping[str, str],
) -> None:
    unfinished = place.parent / f"{_UNFINISHED_PREFIX}{place.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, values in tensors.items():
            save_file(values, unfinished / name)
            flush_to_disk(unfinished / name)
        write_json(unfinished / STATE_FILE, state)
        write_manifest(unfinished, experts)
        flush_to_disk(unfinished)
        if place.exists():
            shutil.rmtree(place)
        os.rename(unfinished, place)
        flush_to_disk(place.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"{place} could not be written: {error}",
            remedy="free space or fix the rights there, then start the same command again; "
            "older checkpoints are untouched",
        ) from error


def _prune(directory: Path, step: int, keep: int) -> None:
    for path in directory.glob(f"{_UNFINISHED_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    checkpoints = list_checkpoints(directory)
    later = [path for path in checkpoints if (_step_of(path) or 0) > step]
    older = [path for path in checkpoints if (_step_of(path) or 0) <= step]
    for path in later + older[max(1, keep) :]:
        shutil.rmtree(path, ignore_errors=True)


def _read_into(step_dir: Path, engine: TrainEngine) -> dict[str, Any]:
    saved = read_json(step_dir / STATE_FILE)
    named = list(named_state(engine.module))
    with _open(step_dir / MODEL_FILE) as file:
        _check_names(step_dir, {name for name, _ in named}, set(file.keys()))
        loaded = [_read_like(file, name, tensor, engine, step_dir) for name, tensor in named]
    with torch.no_grad():
        for (_, tensor), value in zip(named, loaded, strict=True):
            tensor.copy_(value)
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
    value: Tensor = stored[slice_of(engine, like.shape[0])] if is_expert else file.get_tensor(key)
    return value


def _restore_rng(step_dir: Path, engine: TrainEngine) -> None:
    with _open(step_dir / RNG_FILE) as file:
        keys = set(file.keys())
        cpu, cuda = f"rank.{engine.rank}.cpu", f"rank.{engine.rank}.cuda"
        if cpu in keys:
            torch.set_rng_state(file.get_tensor(cpu))
        if cuda in keys and engine.device.type == "cuda":
            torch.cuda.set_rng_state(file.get_tensor(cuda), engine.device)


def _on_rank_zero(engine: TrainEngine, work: Callable[[], T]) -> T:
    """Run on rank 0 and return, or raise, on every rank alike."""
    result: T | None = None
    failure: Exception | None = None
    if engine.rank == 0:
        result, failure = _attempt(work)
    if engine.world_size > 1:
        shared = [result, _for_others(failure)]
        dist.broadcast_object_list(shared, src=0, device=engine.device)
        if engine.rank > 0:
            result, failure = shared  # type: ignore[assignment]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _on_every_rank(engine: TrainEngine, work: Callable[[], T]) -> T:
    """Run on every rank; if it fails on one, it raises on all, so that none waits for another."""
    result, failure = _attempt(work)
    if engine.world_size > 1:
        failures: list[Exception | None] = [None] * engine.world_size
        dist.all_gather_object(failures, _for_others(failure))
        failure = failure or next((f for f in failures if f is not None), None)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # Whatever it is, the other ranks must not wait for ever.
        return None, error


def _for_others(failure: Exception | None) -> MoeDistError | None:
    """Return what the other ranks raise: only our own errors surely survive pickling."""
    if failure is None or isinstance(failure, MoeDistError):
        return failure
    return CheckpointError(
        f"another rank failed: {type(failure).__name__}: {failure}", remedy="see that rank's error"
    )
