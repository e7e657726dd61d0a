"""Wishes for workers, checked against a real Ray cluster."""

from __future__ import annotations

import time

import pytest

from moe_dist.errors import ClusterError
from moe_dist.training.driver import ray_session
from moe_dist.training.placement import plan_workers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_more_than_there_is_is_refused_at_once() -> None:
    with ray_session() as session:
        session.connect()
        started = time.monotonic()
        with pytest.raises(ClusterError, match=r"=64 x .*cpus_per_worker=2 = 128 CPUs") as caught:
            plan_workers(64, 2, None)
        assert "num_workers to" in caught.value.remedy
        with pytest.raises(ClusterError, match="needs 1 GPUs"):
            plan_workers(1, 1, True)
        assert time.monotonic() - started < 10
