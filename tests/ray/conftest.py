"""One Ray for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_dist.workers.ray_session import RaySession, ray_session


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    """Ray on this machine, connected."""
    pytest.importorskip("ray")
    with ray_session() as session:
        session.connect()
        yield session
