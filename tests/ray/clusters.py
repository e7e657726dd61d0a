"""A Ray cluster of several nodes on this machine, apart from every other one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OBJECT_STORE_BYTES = 100 * 2**20


class SmallCluster:
    """Nodes of a few CPUs each, which may be added and taken away.

    Args:
        cpus: of the head, then of the other nodes.
        kind: what an autoscaler would call the nodes; empty for none.
        temp_dir: a short path, since sockets lie below it.
    """

    def __init__(self, *cpus: int, temp_dir: str, kind: str = "") -> None:
        from ray._common.utils import get_default_ray_temp_dir
        from ray.cluster_utils import Cluster

        # It notes its address there, and does not make the directory if its own is elsewhere.
        Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
        self._kind = kind
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args=self._arguments(cpus[0]) | {"temp_dir": temp_dir, "dashboard_port": 0},
        )
        self.nodes = [self.add(count) for count in cpus[1:]]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, cpus: int) -> Any:
        return self._cluster.add_node(**self._arguments(cpus))

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()

    def _arguments(self, cpus: int) -> dict[str, Any]:
        variables = {"RAY_NODE_TYPE_NAME": self._kind} if self._kind else {}
        return {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "env_vars": variables,
        }


@contextmanager
def small_cluster(*cpus: int, temp_dir: str, kind: str = "") -> Iterator[SmallCluster]:
    """Start a cluster to which `RaySession` connects."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = os.environ.get("RAY_ADDRESS")
    cluster = SmallCluster(*cpus, temp_dir=temp_dir, kind=kind)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before
        import ray

        # A test that gave back worker slots after its session ended has connected once more.
        ray.shutdown()
        cluster.close()
