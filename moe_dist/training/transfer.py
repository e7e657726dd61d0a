"""Bringing batches to the device ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

ItemT = TypeVar("ItemT")


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a micro-batch; copies from pinned memory overlap with computation.

    Args:
        batch: tensors by name.
        device: where to.

    Returns:
        A new dict.
    """
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}


def pinned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a micro-batch into page-locked memory.

    Args:
        batch: tensors by name, on the CPU.

    Returns:
        A new dict.
    """
    return {
        name: column if column.is_pinned() else column.pin_memory()
        for name, column in batch.items()
    }


def ahead(
    batches: Iterable[dict[str, Tensor]], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield micro-batches on the device, collated while the one before computes.

    Args:
        batches: on the CPU.
        device: where to; without a GPU nothing runs ahead, since the cores are busy anyway.

    Yields:
        Moved micro-batches.
    """
    for batch in prepared(batches, pinned, device):
        yield to_device(batch, device)


def prepared(
    items: Iterable[ItemT], prepare: Callable[[ItemT], ItemT], device: torch.device
) -> Iterator[ItemT]:
    """Take and prepare the next item in a thread while the caller works with this one.

    Args:
        items: what to iterate over.
        prepare: applied to each where there is a GPU.
        device: on a CPU the items come as they are, without a thread.

    Yields:
        The items in order.
    """
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
