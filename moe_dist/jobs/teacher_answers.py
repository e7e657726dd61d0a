"""Taking a teacher's answers to all training rows once, and keeping them on disk by content.

Without dropout a frozen teacher says the same of a row in every epoch, to every student of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_dist.config.sections import TrainConfig
from moe_dist.conversion.heads import answered_kind
from moe_dist.data.cache import (
    build_once,
    clear_abandoned,
    default_cache_dir,
    is_whole,
    note_digests,
)
from moe_dist.data.loaders import Encoded, collate
from moe_dist.data.tasks import Split
from moe_dist.distributed.update import Precision, precision_context
from moe_dist.errors import MoeDistError
from moe_dist.jobs.job_data import AnyJobData, JobData, MixtureData
from moe_dist.training.collectives import gather_values, num_ranks, own_rank, sum_over_ranks
from moe_dist.training.objectives import reads
from moe_dist.training.teacher_answers import TeacherAnswers
from moe_dist.training.transfer import to_device
from moe_dist.whole_files import flush_to_disk

logger = logging.getLogger("moe_dist.training")

FOLDER = "teacher_answers"
_FILE, _VALUES, _META = "answers.safetensors", "values", "answers.json"
_VERSION = 2
_MOVED_BYTES = 2**26
"""How much of the answers is on a device at once while ranks share them."""


def kept_answers(
    teacher: nn.Module,
    data: AnyJobData,
    *,
    split: Split,
    objectives: Collection[str],
    max_gib: float,
    asked: bool,
    train: TrainConfig,
    precision: Precision,
    device: torch.device,
) -> TeacherAnswers | None:
    """Find the teacher's answers on disk, or take and keep them; collective.

    Rank 0 logs where they lie, or why each step asks the teacher: to the user where that was asked
    for or is a fault.

    Args:
        teacher: frozen, on the device.
        data: what is trained on.
        split: of it, what is trained on.
        objectives: losses that compare with the teacher.
        max_gib: the most that kept answers take on disk, those of other teachers included, and in
            each rank's memory; 0 keeps none.
        asked: whether somebody chose that limit.
        train: how long the training is.
        precision: of the steps.
        device: of the losses.

    Returns:
        The answers; None where there are none to be kept.
    """
    if not objectives or not max_gib:
        return None
    if isinstance(data, MixtureData):
        _say_why("there are several tasks", asked and train.num_epochs > 1)
        return None
    encoded = data.part(split)
    is_repeated = _num_epochs(train, len(encoded)) > 1
    reason = _why_not(teacher, encoded, objectives)
    if reason:
        _say_why(reason, asked and is_repeated)
        return None
    folder, found, is_large = Path(), None, False
    if own_rank() == 0:
        cache = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
        folder = cache / FOLDER / _digest(teacher, encoded, precision, device)
        is_large = _is_large(folder, max_gib)
        found = None if is_large else _read(folder, len(encoded))
        if found is None and not is_large and folder.is_dir():
            logger.warning("the teacher's kept answers are damaged and not used: %s", folder)
    shape, is_large = gather_values((None if found is None else tuple(found.shape), is_large))[0]
    if shape is None:
        if not is_large and not is_repeated:
            _say_why("each row is trained on once", is_told=False)
            return None
        if not is_large:
            found = _take(teacher, data, encoded, max_gib, train.eval_batch_size, precision, device)
        if found is None:
            too_large = f"its answers take more than distill.keep_answers_gib={max_gib:g}"
            _say_why(too_large, is_repeated)
            return None
    elif found is None:
        found = torch.zeros(shape)
    _share(found, device)
    if own_rank() == 0:
        if shape is None:
            _keep(folder, found, max_gib)
        if folder.is_dir():
            level = logging.WARNING if asked else logging.INFO
            line = "the teacher was asked once about each row; its answers lie in %s"
            logger.log(level, line, folder)
    order = np.argsort(encoded.sample_ids)
    return TeacherAnswers(
        torch.from_numpy(encoded.sample_ids[order].astype(np.int64)), found[order], device
    )


def _why_not(teacher: nn.Module, encoded: Encoded, objectives: Collection[str]) -> str:
    """Say why answers cannot be kept; empty where they can."""
    if reads(objectives, "hidden") or reads(objectives, "attention"):
        return "losses read its hidden states"
    if not answered_kind(teacher).answers_once:
        return "it has an answer for each token"
    if len(np.unique(encoded.sample_ids)) < len(encoded):
        return "rows give several samples each, as pairs of texts do"
    return ""


def _num_epochs(train: TrainConfig, num_samples: int) -> float:
    """Say how often each sample is trained on."""
    if train.max_steps is None:
        return train.num_epochs
    return min(train.num_epochs, train.max_steps * train.batch_size / num_samples)


def _say_why(reason: str, is_told: bool) -> None:
    """Log why answers are not kept; only warnings reach the user from a worker."""
    if own_rank() == 0:
        level = logging.WARNING if is_told else logging.INFO
        logger.log(level, "the teacher is asked in every step: %s", reason)


def _digest(
    teacher: nn.Module, encoded: Encoded, precision: Precision, device: torch.device
) -> str:
    """Name what answers depend on: weights, tokens, and how it is computed."""
    hashed = hashlib.sha256()
    model: Any = teacher
    said = (str(_VERSION), torch.__version__, precision, device.type, type(teacher).__name__)
    hashed.update("\0".join((*said, model.config.to_json_string())).encode())
    for name, tensor in teacher.state_dict().items():
        hashed.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    arrays: list[Any] = [encoded.input_ids, encoded.offsets, encoded.sample_ids]
    arrays += [encoded.token_type_ids, *encoded.columns.values()]
    for array in arrays:
        if array is not None:
            hashed.update(f"{array.dtype}{array.shape}".encode())
            hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()[:32]


@torch.no_grad()
def _take(
    teacher: nn.Module,
    data: JobData,
    encoded: Encoded,
    max_gib: float,
    batch_size: int,
    precision: Precision,
    device: torch.device,
) -> Tensor | None:
    """Ask the teacher about this rank's share of the samples: (N, ...), zeros for the others'.

    None where they take more than is set.
    """
    kind = answered_kind(teacher)
    by_length = np.argsort(encoded.lengths, kind="stable")
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    found: Tensor | None = None
    # Every rank sees the first batch, for the shape.
    for number, rows in enumerate(batches):
        if number and number % num_ranks() != own_rank():
            continue
        batch = to_device(collate(encoded, rows, data.pad_token_id), device)
        with precision_context(precision, device):
            answers = kind.predictions(teacher, kind.run(teacher, batch), batch).float().cpu()
        if found is None:
            if len(encoded) * answers[0].nbytes > max_gib * 2**30:
                return None
            found = torch.zeros(len(encoded), *answers.shape[1:])
        if number % num_ranks() == own_rank():
            found[torch.from_numpy(rows)] = answers
    return found


def _share(found: Tensor, device: torch.device) -> None:
    """Add the ranks' answers in place, on the device part by part; collective."""
    if num_ranks() == 1:
        return
    for part in found.split(max(1, _MOVED_BYTES // max(1, found[0].nbytes))):
        part.copy_(sum_over_ranks(part.to(device)))


def _is_large(folder: Path, max_gib: float) -> bool:
    """Tell whether answers that lie there take more than is set, before they are read."""
    try:
        with safe_open(folder / _FILE, framework="pt") as opened:
            shape = opened.get_slice(_VALUES).get_shape()
    except (OSError, SafetensorError):
        return False
    return bool(prod(shape) * torch.float32.itemsize > max_gib * 2**30)


def _read(folder: Path, num_samples: int) -> Tensor | None:
    """Give whole and finite answers; None where there are none."""
    if not is_whole(folder, _META, _VERSION):
        return None
    try:
        values = load_file(folder / _FILE)[_VALUES]
    except (OSError, KeyError, SafetensorError):
        return None
    if len(values) != num_samples or not values.isfinite().all():
        return None
    with suppress(OSError):  # Somebody else's cache: it is used, and does not count as used.
        os.utime(folder)
    return values


def _write(folder: Path, values: Tensor) -> None:
    """Write answers so that they outlive the machine, before the folder takes its place."""
    save_file({_VALUES: values}, folder / _FILE)
    note_digests(folder, _META, _VERSION)
    for path in (folder / _FILE, folder / _META, folder):
        flush_to_disk(path)


def _keep(folder: Path, values: Tensor, max_gib: float) -> None:
    """Write answers, and remove those that were not used for longest beyond the limit."""
    if not values.isfinite().all():
        logger.warning("the teacher's answers are not kept: some are infinite or no numbers")
        return
    room = int(max_gib * 2**30) - values.nbytes
    try:
        build_once(
            folder,
            lambda built: _write(built, values),
            is_good=lambda built: _read(built, len(values)) is not None,
        )
        clear_abandoned(folder.parent)
        for other, size in _others(folder):
            room -= size
            if room < 0:
                shutil.rmtree(other, ignore_errors=True)
    except (MoeDistError, OSError) as error:
        logger.warning("the teacher's answers are not kept for later students: %s", error)


def _others(folder: Path) -> list[tuple[Path, int]]:
    """List what else is kept, lately used first, with its bytes."""
    found = []
    for other in folder.parent.glob("[!.]*"):
        with suppress(FileNotFoundError):  # Another process makes room too.
            if other != folder and other.is_dir():
                size = sum(file.stat().st_size for file in other.iterdir())
                found.append((other.stat().st_mtime, other, size))
    return [(other, size) for _, other, size in sorted(found, reverse=True)]
