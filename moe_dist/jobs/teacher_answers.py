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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_dist.config.sections import TrainConfig
from moe_dist.conversion.heads import answered_kind
from moe_dist.data.cache import build_once, default_cache_dir
from moe_dist.data.loaders import Encoded, collate
from moe_dist.data.tasks import Split
from moe_dist.distributed.update import Precision, precision_context
from moe_dist.errors import MoeDistError
from moe_dist.jobs.job_data import AnyJobData, JobData, MixtureData
from moe_dist.training.collectives import gather_values, num_ranks, own_rank, sum_over_ranks
from moe_dist.training.objectives import reads
from moe_dist.training.teacher_answers import TeacherAnswers
from moe_dist.training.transfer import to_device

logger = logging.getLogger("moe_dist.training")

FOLDER = "teacher_answers"
_FILE, _VALUES = "answers.safetensors", "values"
_VERSION = "1"


def kept_answers(
    teacher: nn.Module,
    data: AnyJobData,
    *,
    split: Split,
    objectives: Collection[str],
    max_gib: float,
    train: TrainConfig,
    precision: Precision,
    device: torch.device,
) -> TeacherAnswers | None:
    """Find the teacher's answers on disk, or take and keep them; collective.

    Rank 0 logs where they come from, or why each step asks the teacher.

    Args:
        teacher: frozen, on the device.
        data: what is trained on.
        split: of it, what is trained on.
        objectives: losses that compare with the teacher.
        max_gib: the most that kept answers take on disk, those of other teachers included; 0 keeps
            none.
        train: how long the training is.
        precision: of the steps.
        device: of the losses.

    Returns:
        The answers; None where there are none to be kept.
    """
    if not objectives or not max_gib:
        return None
    if isinstance(data, MixtureData):
        _say_why("there are several tasks")
        return None
    encoded = data.part(split)
    reason = _why_not(teacher, encoded, objectives)
    if reason:
        _say_why(reason)
        return None
    folder, found = Path(), None
    if own_rank() == 0:
        cache = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
        folder = cache / FOLDER / _digest(teacher, encoded, precision, device)
        found = _read(folder, len(encoded))
    shape = gather_values(None if found is None else tuple(found.shape))[0]
    if shape is None:
        if _num_epochs(train, len(encoded)) <= 1:
            _say_why("each row is trained on once")
            return None
        found = _take(teacher, data, encoded, max_gib, train.eval_batch_size, precision, device)
        if found is None:
            _say_why(f"its answers take more than distill.keep_answers_gib={max_gib:g}")
            return None
    elif found is None:
        found = torch.zeros(shape)
    found = sum_over_ranks(found.to(device)).cpu()
    if own_rank() == 0:
        if shape is None:
            _keep(folder, found, max_gib)
        logger.info("the teacher was asked once about each row; its answers lie in %s", folder)
    order = np.argsort(encoded.sample_ids)
    return TeacherAnswers(
        torch.from_numpy(encoded.sample_ids[order].astype(np.int64)), found[order].to(device)
    )


def _why_not(teacher: nn.Module, encoded: Encoded, objectives: Collection[str]) -> str:
    """Say why answers cannot be kept; empty where they can."""
    if reads(objectives, "hidden") or reads(objectives, "attention"):
        return "losses read its hidden states"
    if not answered_kind(teacher).answers_once:
        return "it has an answer for each token"
    if len(np.unique(encoded.sample_ids)) < len(encoded):
        return "several samples have one number"
    return ""


def _num_epochs(train: TrainConfig, num_samples: int) -> float:
    """Say how often each sample is trained on."""
    if train.max_steps is None:
        return train.num_epochs
    return min(train.num_epochs, train.max_steps * train.batch_size / num_samples)


def _say_why(reason: str) -> None:
    if own_rank() == 0:
        logger.info("the teacher is asked in every step: %s", reason)


def _digest(
    teacher: nn.Module, encoded: Encoded, precision: Precision, device: torch.device
) -> str:
    """Name what answers depend on: weights, tokens, and how it is computed."""
    hashed = hashlib.sha256()
    model: Any = teacher
    said = (_VERSION, torch.__version__, precision, device.type, type(teacher).__name__)
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


def _read(folder: Path, num_samples: int) -> Tensor | None:
    try:
        values = load_file(folder / _FILE)[_VALUES]
    except (OSError, KeyError, SafetensorError):
        return None
    if len(values) != num_samples:
        return None
    with suppress(OSError):  # Somebody else's cache: it is used, and does not count as used.
        os.utime(folder)
    return values


def _keep(folder: Path, values: Tensor, max_gib: float) -> None:
    """Write answers, and remove those that were not used for longest beyond the limit."""
    room = int(max_gib * 2**30) - values.nbytes
    try:
        build_once(
            folder,
            lambda built: save_file({_VALUES: values}, built / _FILE),
            is_good=lambda built: _read(built, len(values)) is not None,
        )
        others = [one for one in folder.parent.glob("[!.]*") if one != folder and one.is_dir()]
        for other in sorted(others, key=lambda one: one.stat().st_mtime, reverse=True):
            room -= sum(file.stat().st_size for file in other.iterdir())
            if room < 0:
                shutil.rmtree(other, ignore_errors=True)
    except (MoeDistError, OSError) as error:
        logger.warning("the teacher's answers are not kept for later students: %s", error)
