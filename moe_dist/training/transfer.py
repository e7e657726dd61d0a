"""Bringing batches to the device ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

ItemT = TypeVar("ItemT")


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a micro-batch; copies from pinned memory overlap with computation."""
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}


def pinned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a micro-batch from the CPU into page-locked memory."""
    return {
        name: column if column.is_pinned() else column.pin_memory()
        for name, column in batch.items()
    }


def ahead(
    batches: Iterable[dict[str, Tensor]], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield micro-batches on the device, collated while the one before computes.

    Without a GPU nothing runs ahead, since the cores are busy anyway.
    """
    for batch in prepared(batches, pinned, device):
        yield to_device(batch, device)


def prepared(
    items: Iterable[ItemT], prepare: Callable[[ItemT], ItemT], device: torch.device
) -> Iterator[ItemT]:
    """Take and prepare the next item in a thread; on a CPU items come as they are, without one."""
    if device.type != "cuda":
        yield from items
        return
    iterator = iter(items)

    def following() -> ItemT | None:
        item = next(iterator, None)
        return None if item is None else prepare(item)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-batch") as worker:
        pending = worker.submit(following)
        while (item := pending.result()) is not None:
            pending = worker.submit(following)
            yield item
