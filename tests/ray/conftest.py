"""One Ray for all tests here that have no wishes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_dist.workers.ray_session import RaySession, ray_session


@pytest.fixture(scope="package")
def session() -> Iterator[RaySession]:
    """Ray on this machine, connected."""
    pytest.importorskip("ray")
    with ray_session(preload=("moe_dist.distributed",)) as session:
        session.connect()
        yield session
