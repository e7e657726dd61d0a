"""Two hosts, and a Ray cluster over them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.network import TwoHosts
from tests.hosts.ray_cluster import RayCluster


@pytest.fixture(scope="session")
def two_hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def ray_cluster(two_hosts: TwoHosts) -> Iterator[RayCluster]:
    with RayCluster(two_hosts) as cluster:
        yield cluster
