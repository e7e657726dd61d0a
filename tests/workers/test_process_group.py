"""Which network the workers talk over."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("ray")

from moe_dist.workers import process_group
from moe_dist.workers.process_group import INTERFACE_VARIABLES, interface_of


def test_interface_that_carries_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("198.51.100.7") is None  # a documentation address, nobody's


def test_a_named_interface_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = INTERFACE_VARIABLES
    monkeypatch.setenv(first, "fast0")
    monkeypatch.delenv(second, raising=False)
    monkeypatch.setattr(process_group.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    process_group._choose_interface()
    chosen = os.environ[first], os.environ[second]
    monkeypatch.delenv(second)
    assert chosen == ("fast0", "lo")
