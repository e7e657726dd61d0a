"""What a Ray cluster has, what of it is free, and what its autoscaler may still add."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the launcher file on the head node, for the autoscaler."""
_STATIC_KIND = "node_"


@dataclass(frozen=True)
class WorkerNeed:
    """What one worker reserves, all of it on one node.

    Args:
        cpus: CPUs.
        gpus: GPUs.
    """

    cpus: int
    gpus: int = 0

    def slots(self, cpus: float, gpus: float) -> int:
        """Count the workers that fit into the CPUs and GPUs of one node."""
        counts = [math.floor(cpus / self.cpus)]
        if self.gpus:
            counts.append(math.floor(gpus / self.gpus))
        return max(0, min(counts))

    def __str__(self) -> str:
        """Name the need as people do."""
        cpus = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return f"{cpus} and {self.gpus} GPU" if self.gpus else cpus


@dataclass(frozen=True)
class Node:
    """One node that is up.

    Args:
        node_id: Ray's.
        address: its IP address.
        kind: the autoscaler's node type; empty where no autoscaler started it.
        cpus: all of its CPUs.
        gpus: all of its GPUs.
        memory_gib: memory that Ray hands out.
        free_cpus: CPUs that nothing has reserved.
        free_gpus: GPUs that nothing has reserved.
    """

    node_id: str
    address: str
    kind: str
    cpus: float
    gpus: float
    memory_gib: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class NodeKind:
    """A sort of node that the autoscaler may add.

    Args:
        name: the node type.
        cpus: of one such node.
        gpus: of one such node.
        max_nodes: how many more of them there may be.
    """

    name: str
    cpus: float
    gpus: float
    max_nodes: int


@dataclass(frozen=True)
class Capacity:
    """A cluster's nodes and its room to grow.

    Args:
        nodes: those that are up.
        kinds: what the autoscaler may add; None where it does not tell.
        max_added: nodes that it may add in all.
    """

    nodes: tuple[Node, ...]
    kinds: tuple[NodeKind, ...] | None = ()
    max_added: int = 0

    def present_slots(self, need: WorkerNeed) -> int:
        """Count the workers that the nodes hold which are up, whatever runs there now."""
        return sum(need.slots(node.cpus, node.gpus) for node in self.nodes)

    def free_slots(self, need: WorkerNeed) -> int:
        """Count the workers that fit at this moment."""
        return sum(need.slots(node.free_cpus, node.free_gpus) for node in self.nodes)

    def most_slots(self, need: WorkerNeed) -> float:
        """Count the workers that the cluster can ever hold; infinite where that is not known."""
        if self.kinds is None:
            return math.inf
        left, added = self.max_added, 0
        by_size = sorted(self.kinds, key=lambda kind: -need.slots(kind.cpus, kind.gpus))
        for kind in by_size:
            count = min(left, kind.max_nodes)
            added += count * need.slots(kind.cpus, kind.gpus)
            left -= count
        return self.present_slots(need) + added


def read_capacity(bootstrap: Path = BOOTSTRAP) -> Capacity:
    """Ask the cluster that this process is connected to.

    How far an autoscaler may go is not told by Ray; it is read from the launcher file that `ray up`
    leaves on the head node, where jobs run. KubeRay leaves none.

    Args:
        bootstrap: that file.

    Returns:
        Nodes, and what may be added; a cluster without an autoscaler has nothing to add.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    nodes = tuple(_node(info) for info in (*status.active_nodes, *status.idle_nodes))
    managed = [node for node in nodes if node.kind]
    if not managed:
        return Capacity(nodes)
    launcher = _read_launcher(bootstrap.expanduser())
    if launcher is not None and {node.kind for node in managed} <= set(launcher[0]):
        return grown_capacity(nodes, *launcher)
    return Capacity(nodes, kinds=None)


def grown_capacity(
    nodes: tuple[Node, ...], kinds: Mapping[str, NodeKind], max_workers: int
) -> Capacity:
    """Work out what an autoscaler may still add to the nodes that are up.

    `kinds` gives the most nodes of each type, `max_workers` of all together without the head.
    """
    present = _count(node.kind for node in nodes)
    left = tuple(
        NodeKind(kind.name, kind.cpus, kind.gpus, max(0, kind.max_nodes - present.get(name, 0)))
        for name, kind in kinds.items()
    )
    num_workers = sum(
        count for name, count in present.items() if name in kinds and kinds[name].max_nodes > 0
    )
    return Capacity(nodes, left, max(0, max_workers - num_workers))


def describe_nodes(capacity: Capacity, *, free: bool = False) -> str:
    """List the nodes' CPUs and GPUs, or the free ones, in one line.

    For example `10.0.0.1: 4 CPUs; 10.0.0.2: 8 CPUs, 1 GPU`.
    """
    parts = []
    for node in sorted(capacity.nodes, key=lambda node: (node.address, node.node_id)):
        cpus, gpus = (node.free_cpus, node.free_gpus) if free else (node.cpus, node.gpus)
        has_gpus = f", {gpus:g} GPU{'s' if gpus != 1 else ''}" if node.gpus else ""
        parts.append(f"{node.address}: {cpus:g} CPU{'s' if cpus != 1 else ''}{has_gpus}")
    return "; ".join(parts) or "no nodes"


def _node(info: Any) -> Node:
    usage = {entry.resource_name: entry for entry in info.resource_usage.usage}

    def total(name: str) -> float:
        return float(usage[name].total) if name in usage else 0.0

    def free(name: str) -> float:
        return float(usage[name].total - usage[name].used) if name in usage else 0.0

    kind = info.ray_node_type_name
    return Node(
        node_id=info.node_id,
        address=info.ip_address,
        # Ray names the type of a node that no autoscaler started after the node itself.
        kind="" if kind == _STATIC_KIND + info.node_id else kind,
        cpus=total("CPU"),
        gpus=total("GPU"),
        memory_gib=total("memory") / (1 << 30),
        free_cpus=free("CPU"),
        free_gpus=free("GPU"),
    )


def _read_launcher(path: Path) -> tuple[dict[str, NodeKind], int] | None:
    """Read node types and the most workers from a launcher file; None where it has none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        max_workers = int(content.get("max_workers", 2))
        head = content.get("head_node_type")
        kinds = {
            name: _launcher_kind(name, entry, 0 if name == head else max_workers)
            for name, entry in content["available_node_types"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
    return kinds, max_workers


def _launcher_kind(name: str, entry: Mapping[str, Any], max_workers: int) -> NodeKind:
    resources = entry["resources"]
    return NodeKind(
        name,
        float(resources.get("CPU", 0)),
        float(resources.get("GPU", 0)),
        int(entry.get("max_workers", max_workers)),
    )


def _count(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
