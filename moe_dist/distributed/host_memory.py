"""Tensors brought together in one rank's host memory, over any back end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class HostBuffers:
    """CPU tensors by name that are filled again and again, so that only the first time allocates.

    Args:
        pinned: lock the pages, for fast copies from a GPU.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a name's contiguous CPU tensor, with the values of its last use.

        Another shape or dtype than the last one's makes a new tensor.
        """
        held = self._tensors.get(name)
        if held is None or held.shape != torch.Size(shape) or held.dtype != dtype:
            held = torch.empty(*shape, dtype=dtype, pin_memory=self._pinned)
            self._tensors[name] = held
        return held


def join_parts(part: Tensor, group: dist.ProcessGroup, whole: Tensor | None) -> None:
    """Lay the parts of a group's ranks one after another in host memory; collective.

    Only the first rank of the group receives; nothing is copied on the way there.

    Args:
        part: this rank's, of equal shape on all, on the device of the group's back end.
        group: the ranks, in the order of their parts.
        whole: on the group's first rank the CPU tensor to fill, whose first dimension is the
            sum of the parts'; None elsewhere.
    """
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank() != ranks[0]:
        dist.send(part.contiguous(), dst=ranks[0], group=group)
        return
    assert whole is not None
    for source, piece in zip(ranks, whole.chunk(len(ranks)), strict=True):
        if source == ranks[0]:
            piece.copy_(part)
        elif part.device.type == "cpu":
            dist.recv(piece, src=source, group=group)
        else:
            received = torch.empty_like(part)
            dist.recv(received, src=source, group=group)
            piece.copy_(received)
