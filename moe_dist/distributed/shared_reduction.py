"""Sums over ranks through memory that they share, a chunk at a time while it is in the cache.

Each element is added up by one rank, in the order of the ranks, so the result is the same on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.shared_memory import SharedMemory, share_memory

CHUNK_BYTES = 1 << 21
_LINE_BYTES = 64

Combine = Callable[..., Tensor]
_KINDS: tuple[Combine, ...] = (torch.add, torch.maximum)


class SharedReduction:
    """Sums over the ranks of a group on one machine; every method is collective.

    In each phase a rank writes a chunk of its own, adds up its share of all ranks' chunks of the
    phase before, and takes the sums of the one before that; then all wait for each other once. So
    of chunks and of sums two are there, in turn.

    Args:
        memory: of the group, `needed_bytes` large.
        chunk_bytes: of one rank in one phase; a multiple of a cache line.
    """

    def __init__(self, memory: SharedMemory, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._memory = memory
        self._chunk_bytes = chunk_bytes
        self._num_ranks = dist.get_world_size(memory.group)
        self._rank = dist.get_rank(memory.group)
        lines = memory.bytes.view(2, self._num_ranks + 1, chunk_bytes)
        self._chunks, self._sums = lines[:, :-1], lines[:, -1]

    @classmethod
    def over(
        cls, group: dist.ProcessGroup, chunk_bytes: int = CHUNK_BYTES
    ) -> SharedReduction | None:
        """Share memory over a group; None, on all ranks, where it cannot be. Collective."""
        memory = share_memory(group, needed_bytes(dist.get_world_size(group), chunk_bytes))
        return None if memory is None else cls(memory, chunk_bytes)

    def average(self, tensors: Sequence[Tensor], divisor: int) -> None:
        """Add up each tensor over ranks and divide it by `divisor`, in place.

        Args:
            tensors: on the CPU, of the same shapes, dtypes and order on every rank. Those of 16
                bits are added up and divided in float32, and rounded once.
            divisor: of the sums.
        """
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            same = [tensor for tensor in tensors if tensor.dtype is dtype and tensor.numel()]
            flat = [tensor.contiguous().view(-1) for tensor in same]
            self._reduce(flat, torch.add, divisor)
            for tensor, reduced in zip(same, flat, strict=True):
                if not tensor.is_contiguous():
                    tensor.copy_(reduced.view(tensor.shape))

    def maximum(self, tensor: Tensor) -> None:
        """Take the maximum of each element over ranks, in place; contiguous, on the CPU."""
        self._reduce([tensor.view(-1)] if tensor.numel() else [], torch.maximum, 1)

    def _reduce(self, flat: Sequence[Tensor], combine: Combine, divisor: int) -> None:
        chunks = _cut(flat, self._chunk_bytes)
        # Ranks that do not agree on this would add up something else.
        purpose = 4 * sum(piece.nbytes for piece in flat) + _KINDS.index(combine)
        for phase in range(len(chunks) + 2 if chunks else 0):
            if phase < len(chunks):
                pieces = chunks[phase]
                own = self._chunks[phase % 2, self._rank]
                torch.cat(pieces, out=_elements(own, pieces))
            if 0 < phase <= len(chunks):
                self._combine(chunks[phase - 1], (phase - 1) % 2, combine, divisor)
            if phase > 1:
                pieces = chunks[phase - 2]
                sums = _elements(self._sums[phase % 2], pieces)
                torch._foreach_copy_(pieces, sums.split([piece.numel() for piece in pieces]))
            if phase <= len(chunks):
                self._memory.wait(purpose)

    def _combine(self, pieces: list[Tensor], side: int, combine: Combine, divisor: int) -> None:
        """Combine this rank's share of all ranks' chunks."""
        share = _share(sum(map(Tensor.numel, pieces)), self._rank, self._num_ranks, pieces[0])
        first, *others = [_elements(chunk, pieces)[share] for chunk in self._chunks[side]]
        result = _elements(self._sums[side], pieces)[share]
        is_short = result.is_floating_point() and result.element_size() < 4
        if is_short:
            first = first.float()
        total = first if is_short else result
        for other in others:
            first = combine(first, other, out=total)
        if divisor != 1:
            total.div_(divisor)
        if is_short:
            result.copy_(total)


def needed_bytes(num_ranks: int, chunk_bytes: int) -> int:
    """Return how much memory the ranks share: two chunks for each, and two of sums."""
    return 2 * (num_ranks + 1) * chunk_bytes


def _cut(flat: Sequence[Tensor], chunk_bytes: int) -> list[list[Tensor]]:
    """Cut flat tensors of one dtype into chunks: the pieces, in order, that fill one each."""
    chunks: list[list[Tensor]] = []
    room = 0
    for tensor in flat:
        start = 0
        while start < tensor.numel():
            if room == 0:
                chunks.append([])
                room = chunk_bytes // tensor.element_size()
            piece = tensor[start : start + room]
            chunks[-1].append(piece)
            start += piece.numel()
            room -= piece.numel()
    return chunks


def _elements(memory: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    """View the first bytes of a chunk as what the pieces hold, one after another."""
    num_elements = sum(map(Tensor.numel, pieces))
    return memory.view(pieces[0].dtype)[:num_elements]


def _share(num_elements: int, rank: int, num_ranks: int, like: Tensor) -> slice:
    """Cut elements into equal shares, at the borders of cache lines."""
    line = _LINE_BYTES // like.element_size()
    lines = -(-num_elements // line)
    start, end = (lines * index // num_ranks * line for index in (rank, rank + 1))
    return slice(min(start, num_elements), min(end, num_elements))
