"""Rows handed from rank to rank through memory that they share.

Each rank has two boxes for every other one, in turn. What does not fit, or would meet a box whose
last message is not taken yet, goes through the group's backend.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class _Peer:
    """What is known of the messages to and from one other rank, which both number from 0.

    Attributes:
        num_sent: to it.
        num_taken_by: of these, by it, in order.
        num_expected: from it, whose numbers were given out.
        num_arrived: from it, of which it has told.
        arrived: those of them that are not taken: whether in a box, and their bytes.
        num_taken: from it, in order.
        taken: those that were taken before an earlier one.
    """

    num_sent: int = 0
    num_taken_by: int = 0
    num_expected: int = 0
    num_arrived: int = 0
    arrived: dict[int, tuple[bool, int]] = field(default_factory=dict)
    num_taken: int = 0
    taken: set[int] = field(default_factory=set)

    def note(self, in_box: bool, num_taken: int, num_bytes: int) -> None:
        """Note what the rank has told of its next message, and of how many it has taken."""
        self.arrived[self.num_arrived] = in_box, num_bytes
        self.num_arrived += 1
        self.num_taken_by += (num_taken - self.num_taken_by) % _MANY

    def note_taken(self, number: int) -> None:
        """Note that a message from the rank was taken."""
        self.taken.add(number)
        while self.num_taken in self.taken:
            self.taken.remove(self.num_taken)
            self.num_taken += 1


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
        self._peers = [_Peer() for _ in range(num_ranks)]

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
        own = self._peers[peer]
        number = own.num_sent
        own.num_sent += 1
        box = self._box(number, self._rank, peer)
        num_bytes = sum(piece.nbytes for piece in pieces)
        in_box = num_bytes <= box.numel() and number - own.num_taken_by < 2
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
        self._memory.tell(peer, _WORD.pack(in_box, own.num_taken % _MANY, num_bytes))
        return work

    def _tag(self, number: int) -> int:
        """Of a message that goes through the backend, where other mailboxes of the group send."""
        return (self._memory.mark + number) % _MAX_TAG + 1

    def _box(self, number: int, source: int, target: int) -> Tensor:
        return self._boxes[number % 2, source, target - (target > source)]

    def expect(self, peer: int) -> int:
        """Return the number of the next message from a rank that nobody was told of yet."""
        own = self._peers[peer]
        own.num_expected += 1
        return own.num_expected - 1

    def take(self, peer: int, number: int, pieces: Sequence[Tensor]) -> None:
        """Wait for a rank's message of this number, and fill contiguous CPU tensors with it.

        Args:
            peer: rank in the group.
            number: that `expect` gave.
            pieces: to be filled.

        Raises:
            RuntimeError: if the message has another size, or the rank is lost.
        """
        own = self._peers[peer]
        while own.num_arrived <= number:
            own.note(*_WORD.unpack(self._memory.hear(peer)))
        in_box, num_bytes = own.arrived.pop(number)
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
        own.note_taken(number)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
