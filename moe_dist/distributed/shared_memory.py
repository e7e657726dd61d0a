"""Memory that the ranks of a group share where all of them are processes of one machine.

The memory has no name (`memfd_create`), and is passed on over a Unix socket that has no file. So
nothing is left behind however a process ends, and a container's small /dev/shm does not matter.

Ranks wait for each other on sockets, at a tenth of what a collective of the backend takes. The
kernel closes those of a dead process; what becomes of the others is then left to the backend.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.peers import own_machine

MAX_RANKS = 16
"""Every two ranks have a socket of their own, and a process may hold 1024 files."""
WORD_BYTES = 16
_TOKEN_BYTES = 16
_PATIENCE_S, _GUEST_PATIENCE_S = 20.0, 0.5
_SPIN_S = 1e-4
_ARRIVED = b"\0"
# How often ranks have waited, and for what.
_WAIT = struct.Struct("<QQ")
_MANY = 1 << 64

T = TypeVar("T")


class SharedMemory:
    """One block of memory that all ranks of a group see, and a way to wait for each other.

    Args:
        group: the ranks.
        memory: descriptor of the block, which is closed here.
        num_bytes: its size.
        links: a connected socket for each other rank, in their order.
        mark: a number of this memory alone, the same on all ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        memory: int,
        num_bytes: int,
        links: Sequence[socket.socket],
        mark: int,
    ) -> None:
        self.group = group
        self.mark = mark
        with os.fdopen(memory) as file:
            mapped = mmap.mmap(file.fileno(), num_bytes)
        self.bytes: Tensor = torch.frombuffer(mapped, dtype=torch.uint8)
        own = dist.get_rank(group)
        others = [rank for rank in range(dist.get_world_size(group)) if rank != own]
        self._links = dict(zip(others, links, strict=True))
        self._timeout_s = _timeout(group).total_seconds()
        self._num_waits = 0
        for link in links:
            _limit_wait(link, self._timeout_s)
        weakref.finalize(self, _close, links)

    def wait(self, purpose: int = 0) -> None:
        """Wait until all ranks of the group have called this as often; collective.

        What each wrote before is there for all others after it.

        Args:
            purpose: what is done, in a number that is the same on all ranks.

        Raises:
            RuntimeError: as `hear`, or if another rank does something else.
        """
        self._num_waits += 1
        word = _WAIT.pack(self._num_waits % _MANY, purpose % _MANY)
        for rank in self._links:
            self.tell(rank, word)
        for rank in self._links:
            if self.hear(rank) != word:
                self.abandon()
                raise RuntimeError(
                    f"rank {rank} of the group shares memory for something else than this one"
                )

    def tell(self, rank: int, word: bytes) -> None:
        """Send a word to another rank of the group, which then sees what was written before.

        Args:
            rank: in the group.
            word: of 1 to `WORD_BYTES` bytes.

        Raises:
            RuntimeError: as `hear`.
        """
        try:
            self._links[rank].send(word)
        except OSError:
            self._fail()

    def hear(self, rank: int) -> bytes:
        """Wait for the next word of another rank.

        Args:
            rank: in the group.

        Returns:
            The word.

        Raises:
            RuntimeError: if a rank is lost, as collectives of the group's backend raise it, or
                if the group's timeout is over.
        """
        try:
            word = _received(self._links[rank])
        except BlockingIOError as fault:
            raise RuntimeError(
                f"timed out after {self._timeout_s:.0f} s of waiting for another rank"
            ) from fault
        except OSError:
            word = b""
        if not word:
            self._fail()
        return word

    def abandon(self) -> None:
        """Let all who wait for this rank know that it comes no more."""
        for link in self._links.values():
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def _fail(self) -> NoReturn:
        # Others may wait for this rank alone, and look at no other.
        self.abandon()
        # It fails as everything else does after a rank's death; a rank that lives, and has only
        # left off, is waited for as long as in any collective.
        dist.barrier(self.group)
        raise RuntimeError("a rank of the group has closed its shared memory")


def share_memory(group: dist.ProcessGroup, num_bytes: int) -> SharedMemory | None:
    """Make memory that all ranks of a group see; collective.

    Args:
        group: of a backend that has CPU tensors.
        num_bytes: how much, all ranks together.

    Returns:
        The memory; None, on all ranks alike, where they are not processes of one machine and
        network namespace, are more than `MAX_RANKS`, or where the machine does not give it.
    """
    ranks = range(dist.get_world_size(group))
    if len(ranks) == 1 or len(ranks) > MAX_RANKS:
        return None
    own = dist.get_rank(group)
    with ExitStack() as stack:
        host = _Host.open(num_bytes, stack) if own == 0 else None
        address, token = (host.address, host.token) if host else (b"", b"")
        told = _tell_all((own_machine(), address, token), group)
        machine, address, token = told[0]
        if not address or not machine or any(other != machine for other, _, _ in told):
            return None
        # The first rank meets each guest only after all are known to wait for it.
        guest = None if host else _Guest.knock(address, token, own, stack)
        if not all(_tell_all(host is not None or guest is not None, group)):
            return None
        passed = host.admit(len(ranks)) if host else guest.receive(len(ranks)) if guest else None
        mark = int.from_bytes(token[:4])
        shared = None if passed is None else _mapped(group, passed, num_bytes, mark)
        if all(_tell_all(shared is not None, group)):
            return shared
    return None


def _tell_all(own: T, group: dist.ProcessGroup) -> list[T]:
    told: list[T] = [own] * dist.get_world_size(group)
    dist.all_gather_object(told, own, group=group)
    return told


def _mapped(
    group: dist.ProcessGroup, descriptors: Sequence[int], num_bytes: int, mark: int
) -> SharedMemory | None:
    memory, *links = descriptors
    sockets = [socket.socket(fileno=link) for link in links]
    try:
        return SharedMemory(group, memory, num_bytes, sockets, mark)
    # Whatever it is, the other ranks wait to hear of it.
    except Exception:
        _close(sockets)
        return None


@dataclass(frozen=True)
class _Host:
    """The first rank's side: it has the memory, and gives the others what they need.

    Args:
        listener: where the others come to.
        address: the listener's, without a file.
        token: what they have to say there.
        memory: descriptor of the memory.
    """

    listener: socket.socket
    address: bytes
    token: bytes
    memory: int

    @classmethod
    def open(cls, num_bytes: int, stack: ExitStack) -> _Host | None:
        """Make the memory and listen, until `stack` is left; None where that cannot be."""
        # Some Pythons were built where the C library had no such memory.
        if sys.platform != "linux" or not hasattr(os, "memfd_create"):
            return None
        with suppress(OSError):
            memory = os.memfd_create("moe-dist")
            stack.callback(os.close, memory)
            # Where the machine has too little this is an error, and not a signal at the first use.
            os.posix_fallocate(memory, 0, num_bytes)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            address = b"\0moe-dist-" + secrets.token_hex(_TOKEN_BYTES).encode()
            listener.bind(address)
            listener.listen(MAX_RANKS)
            return cls(listener, address, secrets.token_bytes(_TOKEN_BYTES), memory)
        return None

    def admit(self, num_ranks: int) -> list[int] | None:
        """Give every other rank the memory and its links; returns the own ones."""
        with ExitStack() as stack, suppress(OSError):
            guests = self._meet(num_ranks - 1, stack)
            ends: list[list[int]] = [[] for _ in range(num_ranks)]
            for rank in range(num_ranks):
                for other in range(rank):
                    pair = socket.socketpair(type=socket.SOCK_SEQPACKET)
                    for at, end in zip((rank, other), pair, strict=True):
                        stack.enter_context(end)
                        ends[at].append(end.fileno())
            for rank, guest in guests.items():
                socket.send_fds(guest, [_ARRIVED], [self.memory, *ends[rank]])
            return [os.dup(descriptor) for descriptor in (self.memory, *ends[0])]
        return None

    def _meet(self, number: int, stack: ExitStack) -> dict[int, socket.socket]:
        """Wait for so many ranks that know the token; an OSError if they do not come in time."""
        guests: dict[int, socket.socket] = {}
        end = time.monotonic() + _PATIENCE_S
        while len(guests) < number:
            self.listener.settimeout(max(1e-3, end - time.monotonic()))
            guest = stack.enter_context(self.listener.accept()[0])
            guest.settimeout(_GUEST_PATIENCE_S)
            # Ranks have said it before they are waited for; strangers may say nothing.
            with suppress(OSError):
                said = guest.recv(_TOKEN_BYTES + 1, socket.MSG_WAITALL)
                if secrets.compare_digest(said[:-1], self.token):
                    guests[said[-1]] = guest
        return guests


@dataclass(frozen=True)
class _Guest:
    """Another rank's side.

    Args:
        connection: to the host.
    """

    connection: socket.socket

    @classmethod
    def knock(cls, address: bytes, token: bytes, rank: int, stack: ExitStack) -> _Guest | None:
        """Come to the host, and stay until `stack` is left; None where it cannot be reached."""
        with suppress(OSError):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(_PATIENCE_S)
            connection.connect(address)
            connection.sendall(token + bytes([rank]))
            return cls(connection)
        return None

    def receive(self, num_ranks: int) -> list[int] | None:
        """Take the memory and the links that the host gives."""
        with suppress(OSError):
            _, passed, _, _ = socket.recv_fds(self.connection, 1, num_ranks)
            for descriptor in passed:
                # Python's own call does not pass the flag for that on.
                os.set_inheritable(descriptor, False)
            if len(passed) == num_ranks:
                return passed
            for descriptor in passed:
                os.close(descriptor)
        return None


def _received(link: socket.socket) -> bytes:
    # To sleep and be woken takes a virtual machine longer than most ranks are apart here. A rank
    # that shares this one's core gets it.
    end = time.monotonic() + _SPIN_S
    while time.monotonic() < end:
        with suppress(BlockingIOError):
            return link.recv(WORD_BYTES, socket.MSG_DONTWAIT)
        os.sched_yield()
    return link.recv(WORD_BYTES)


def _timeout(group: dist.ProcessGroup) -> timedelta:
    backend = group._get_backend(torch.device("cpu"))
    timeout: timedelta = backend.options._timeout
    return timeout


def _limit_wait(link: socket.socket, seconds: float) -> None:
    # By the kernel: a timeout of Python's asks twice for every byte.
    link.setblocking(True)
    limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _close(links: Sequence[socket.socket]) -> None:
    for link in links:
        link.close()
