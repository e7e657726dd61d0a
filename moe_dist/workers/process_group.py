"""The workers' process group, over the network that Ray uses.

Left alone, gloo and NCCL look for an interface by the machine's own name or by order. On a machine
with several networks, or whose name resolves to the loopback, they take one on which the other
nodes cannot be reached.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass
class NodeTorchConfig(TorchConfig):
    """A `TorchConfig` whose workers talk over the interface of their node's Ray address.

    An interface that the user named in `GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME` stays.
    """

    @property
    def backend_cls(self) -> type:
        """The backend that Ray starts on the workers."""
        return _NodeBackend


class _NodeBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def interface_of(address: str) -> str | None:
    """Find the network interface of an IPv4 or IPv6 address; None if none carries it."""
    for name, addresses in psutil.net_if_addrs().items():
        # A link-local IPv6 address ends in its interface: fe80::1%eth0.
        if address in {entry.address.partition("%")[0] for entry in addresses}:
            return name
    return None


def _choose_interface() -> None:
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, name)
