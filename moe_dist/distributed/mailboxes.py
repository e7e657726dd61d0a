"""Rows handed from rank to rank through memory that they share.

Each rank has two boxes for every other one, in turn. What does not fit, or would meet a box whose
last message is not taken yet, goes through the group's backend.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.shared_memory import SharedMemory, share_memory

BOX_BYTES = 1 << 22
"""Of one rank's messages to all others in one exchange."""
# Whether the message is in the box, how many of the other's messages are taken, in order, and the
# message's bytes.
_WORD = struct.Struct("<?IQ")
_MAX_TAG, _MANY = 1 << 30, 1 << 32


class Mailboxes:
    """Messages between the ranks of a group on one machine.

    Both sides number the messages from one to the other by themselves, so a receiver says at
    once which one it will take, and takes it later; several may be under way.

    Args:
        memory: of the group.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        num_ranks, self._rank = dist.get_world_size(memory.group), dist.get_rank(memory.group)
        # From which rank, to which of the others.
        self._boxes = memory.bytes.view(2, num_ranks, num_ranks - 1, -1)
        self._num_sent = [0] * num_ranks
        self._num_expected = [0] * num_ranks
        self._num_taken_by = [0] * num_ranks
        self._arrived: list[dict[int, tuple[bool, int]]] = [{} for _ in range(num_ranks)]
        self._num_arrived = [0] * num_ranks
        self._taken: defaultdict[int, set[int]] = defaultdict(set)
        self._num_taken = [0] * num_ranks

    @classmethod
    def over(cls, group: dist.ProcessGroup, box_bytes: int = BOX_BYTES) -> Mailboxes | None:
        """Share memory over a group; None, on all ranks, where it cannot be. Collective."""
        num_ranks = dist.get_world_size(group)
        num_others = max(1, num_ranks - 1)
        of_one = box_bytes // num_others // 64 * 64
        memory = share_memory(group, 2 * num_ranks * num_others * of_one)
        return None if memory is None else cls(memory)

    def send(self, peer: int, pieces: Sequence[Tensor]) -> dist.Work | None:
        """Send a message.

        Args:
            peer: rank in the group.
            pieces: contiguous CPU tensors that it consists of.

        Returns:
            What to wait for before the tensors change, if anything.
        """
        number = self._num_sent[peer]
        self._num_sent[peer] += 1
        box = self._box(number, self._rank, peer)
        num_bytes = sum(piece.nbytes for piece in pieces)
        in_box = num_bytes <= box.numel() and number - self._num_taken_by[peer] < 2
        work = None
        if in_box:
            start = 0
            for piece in pieces:
                box[start : start + piece.nbytes].copy_(_bytes(piece))
                start += piece.nbytes
        else:
            whole = torch.cat([_bytes(piece) for piece in pieces])
            work = dist.isend(
                whole, group=self._memory.group, group_dst=peer, tag=self._tag(number)
            )
        self._memory.tell(peer, _WORD.pack(in_box, self._num_taken[peer] % _MANY, num_bytes))
        return work

    def _tag(self, number: int) -> int:
        """Of a message that goes through the backend, where other mailboxes of the group send."""
        return (self._memory.mark + number) % _MAX_TAG + 1

    def _box(self, number: int, source: int, target: int) -> Tensor:
        return self._boxes[number % 2, source, target - (target > source)]

    def expect(self, peer: int) -> int:
        """Return the number of the next message from a rank that nobody was told of yet."""
        self._num_expected[peer] += 1
        return self._num_expected[peer] - 1

    def take(self, peer: int, number: int, pieces: Sequence[Tensor]) -> None:
        """Wait for a rank's message of this number, and fill contiguous CPU tensors with it.

        Args:
            peer: rank in the group.
            number: that `expect` gave.
            pieces: to be filled.

        Raises:
            RuntimeError: if the message has another size, or the rank is lost.
        """
        arrived = self._arrived[peer]
        while self._num_arrived[peer] <= number:
            in_box, num_taken, num_bytes = _WORD.unpack(self._memory.hear(peer))
            arrived[self._num_arrived[peer]] = in_box, num_bytes
            self._num_arrived[peer] += 1
            self._num_taken_by[peer] += (num_taken - self._num_taken_by[peer]) % _MANY
        in_box, num_bytes = arrived.pop(number)
        if num_bytes != sum(piece.nbytes for piece in pieces):
            self._memory.abandon()
            raise RuntimeError(f"rank {peer} of the group has sent another message than expected")
        if in_box:
            whole = self._box(number, peer, self._rank)
        else:
            whole = torch.empty(num_bytes, dtype=torch.uint8)
            dist.recv(whole, group=self._memory.group, group_src=peer, tag=self._tag(number))
        start = 0
        for piece in pieces:
            _bytes(piece).copy_(whole[start : start + piece.nbytes])
            start += piece.nbytes
        taken = self._taken[peer]
        taken.add(number)
        while self._num_taken[peer] in taken:
            taken.remove(self._num_taken[peer])
            self._num_taken[peer] += 1


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
