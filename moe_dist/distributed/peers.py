"""Who the ranks of a process group are, and how each can be asked where it is.

Every rank listens on a port of its own. The question goes straight to the process, so it needs
neither the group's collectives, nor its store, nor rank 0, nor shared storage. Who asks must know
the token of the group.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum

import torch.distributed as dist

from moe_dist.distributed.position import Position, current_position

_PEER_KEY = "moe_dist/peer/{rank}"
_ROSTER_KEY = "moe_dist/roster"
_TOKEN_BYTES = 16
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Peer:
    """One rank's process.

    Args:
        rank: in the default process group.
        pid: its process id on its host.
        host: its host's name.
        address: where it can be asked.
        port: where it can be asked; 0 if it does not listen.
        machine: equal for processes that can signal each other by process id.
    """

    rank: int
    pid: int
    host: str
    address: str = ""
    port: int = 0
    machine: str = ""

    def __str__(self) -> str:
        where = self.host if self.address.startswith("127.") else f"{self.host} {self.address}"
        return f"rank {self.rank} (host {where.strip()}, pid {self.pid})"


@dataclass(frozen=True)
class Roster:
    """All ranks of one attempt.

    Args:
        attempt: how often the job was started, this time included.
        token: shared by the ranks, and by nobody else.
        peers: one entry for each rank, in their order.
    """

    attempt: int
    token: str
    peers: tuple[Peer, ...]


class Health(Enum):
    """What a question to a rank's process found."""

    ANSWERS = "answers"
    SILENT = "does not answer"
    GONE = "is gone"
    UNKNOWN = "could never be asked"


@dataclass(frozen=True)
class Answer:
    """What a rank said.

    Args:
        health: of its process.
        position: where it is, with `since` as seconds that have passed; None without an answer.
    """

    health: Health
    position: Position | None = None


class Listener:
    """Answers, from a thread, where this process is; until the process ends.

    Args:
        address: where to listen.
    """

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((address, 0))
        self._socket.listen(64)
        self._token = b""
        self.address = address
        self.port = int(self._socket.getsockname()[1])

    def start(self, token: str) -> None:
        """Answer from now on who knows the token."""
        self._token = token.encode()
        threading.Thread(target=self._serve, name="where-am-i", daemon=True).start()

    def _serve(self) -> None:
        while True:
            with suppress(OSError):
                asking, _ = self._socket.accept()
                with asking:
                    self._answer(asking)

    def _answer(self, asking: socket.socket) -> None:
        asking.settimeout(_PATIENCE_S)
        if not secrets.compare_digest(_receive(asking, len(self._token)), self._token):
            return
        position = current_position()
        told = position._replace(since=time.monotonic() - position.since)
        asking.sendall(json.dumps(told).encode() + b"\n")


def own_peer(listener: Listener | None = None) -> Peer:
    """Describe this process, which is rank 0 without a process group."""
    return Peer(
        rank=dist.get_rank() if dist.is_initialized() else 0,
        pid=os.getpid(),
        host=socket.gethostname(),
        address=listener.address if listener else "",
        port=listener.port if listener else 0,
        machine=own_machine(),
    )


def own_address() -> str:
    """Find this host's address on the way to the group's master; loopback without one."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # Sends nothing; it only picks the way.
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def meet(own: Peer, *, attempt: int = 1) -> Roster:
    """Exchange entries with all ranks of the default group; all of them call it together.

    The exchange goes through the group's store and not through a collective, so it works alike with
    every backend and before any device is chosen. Of `attempt`, how often the job was started, rank
    0's word counts.
    """
    token = secrets.token_hex(_TOKEN_BYTES)
    if not dist.is_initialized():
        return Roster(attempt, token, (own,))
    store = dist.distributed_c10d._get_default_store()
    if own.rank == 0:
        store.set(_ROSTER_KEY, json.dumps([attempt, token]))
    store.set(_PEER_KEY.format(rank=own.rank), json.dumps(asdict(own)))
    attempt, token = json.loads(store.get(_ROSTER_KEY))
    entries = [store.get(_PEER_KEY.format(rank=rank)) for rank in range(dist.get_world_size())]
    return Roster(attempt, token, tuple(Peer(**json.loads(entry)) for entry in entries))


def ask(peer: Peer, token: str, *, patience_s: float = _PATIENCE_S) -> Answer:
    """Ask a rank where it is, for `patience_s` seconds at most.

    `SILENT` where the process is stopped or its host cannot be reached, `GONE` where the host
    answers and the process does not exist any more.
    """
    try:
        with socket.create_connection((peer.address, peer.port), timeout=patience_s) as connection:
            connection.sendall(token.encode())
            told = b""
            while not told.endswith(b"\n"):
                block = connection.recv(4096)
                if not block:
                    return Answer(Health.GONE)
                told += block
        return Answer(Health.ANSWERS, Position(*json.loads(told)))
    except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
        return Answer(Health.GONE)
    except OSError:  # No answer in time, no way to the host.
        return Answer(Health.SILENT)


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        block = connection.recv(size - len(received))
        if not block:
            break
        received += block
    return received


def own_machine() -> str:
    """Name the boot of the kernel and the container in it: there a process id means a process."""
    with suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            boot = stream.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.readlink('/proc/self/ns/net')}"
    return ""
