"""Who the ranks of a process group are: their processes and hosts."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass

import torch.distributed as dist

_STORE_KEY = "moe_dist/peer/{rank}"


@dataclass(frozen=True)
class Peer:
    """One rank's process.

    Args:
        rank: in the default process group.
        pid: its process id on its host.
        host: its host's name.
    """

    rank: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def own_peer() -> Peer:
    """Describe this process.

    Returns:
        Its entry; rank 0 without a process group.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Peer(rank=rank, pid=os.getpid(), host=socket.gethostname())


def meet(own: Peer) -> list[Peer]:
    """Exchange entries with all ranks of the default group; all of them call it together.

    The exchange goes through the group's store and not through a collective, so it works alike
    with every backend and before any device is chosen.

    Args:
        own: this process's entry.

    Returns:
        All entries, by rank.
    """
    if not dist.is_initialized():
        return [own]
    store = dist.distributed_c10d._get_default_store()
    store.set(_STORE_KEY.format(rank=own.rank), json.dumps(asdict(own)))
    return [
        Peer(**json.loads(store.get(_STORE_KEY.format(rank=rank))))
        for rank in range(dist.get_world_size())
    ]
