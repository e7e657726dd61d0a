"""Bringing batches to the device ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

BatchT = TypeVar("BatchT")


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a micro-batch.

    Args:
        batch: tensors by name.
        device: where to; on a GPU the copy overlaps with computation.

    Returns:
        A new dict.
    """
    if device.type != "cuda":
        return {name: column.to(device) for name, column in batch.items()}
    return {
        name: (column if column.is_pinned() else column.pin_memory()).to(device, non_blocking=True)
        for name, column in batch.items()
    }


def on_device(batches: Iterable[BatchT], device: torch.device) -> Iterator[BatchT]:
    """Yield step batches whose micro-batches are on the device.

    On a GPU a thread collates and pins the next step while the current one computes.

    Args:
        batches: objects with a list `micro_batches`.
        device: where to.

    Yields:
        Copies of them with moved tensors.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _moved(batch, device)
        return
    iterator = iter(batches)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-batch") as worker:
        pending = worker.submit(_next_pinned, iterator)
        while (batch := pending.result()) is not None:
            pending = worker.submit(_next_pinned, iterator)
            yield _moved(batch, device)


def _next_pinned(iterator: Iterator[Any]) -> Any | None:
    batch = next(iterator, None)
    if batch is None:
        return None
    pinned = copy(batch)
    pinned.micro_batches = [
        {name: column.pin_memory() for name, column in micro_batch.items()}
        for micro_batch in batch.micro_batches
    ]
    return pinned


def _moved(batch: Any, device: torch.device) -> Any:
    moved = copy(batch)
    moved.micro_batches = [to_device(micro_batch, device) for micro_batch in batch.micro_batches]
    return moved
