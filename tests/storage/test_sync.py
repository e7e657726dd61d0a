"""Copying from a thread: it outlives an outage, and nothing is left behind at the end."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from moe_dist.errors import StorageError
from moe_dist.storage.sync import Sync

OFTEN_S = 0.01
NEVER_S = 3600.0


class Copies:
    """A store that is away for its first calls."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_failures = num_failures
        self.num_calls = 0
        self.num_done = 0

    def __call__(self) -> None:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise StorageError("the store is away", remedy="wait")
        self.num_done += 1


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(OFTEN_S)


def test_an_outage_is_said_once_and_copying_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    copies = Copies(num_failures=3)
    with Sync(copies).every(OFTEN_S, "test"):
        wait_until(lambda: copies.num_done > 1)
    assert caplog.messages == ["the store is away; trying again"]


def test_what_changed_last_is_copied_at_the_end() -> None:
    copies, results = Copies(), Copies()
    with Sync(copies).every(NEVER_S, "test"):
        assert copies.num_done == 0
    assert copies.num_done == 1
    with Sync(copies).every(NEVER_S, "test", finish=results):
        pass
    assert (copies.num_done, results.num_done) == (1, 1)


def test_a_last_copy_that_fails_is_an_error_only_where_it_is_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        pytest.raises(StorageError, match="away"),
        Sync(Copies()).every(NEVER_S, "test", finish=Copies(num_failures=1)),
    ):
        pass
    assert caplog.messages == []
    for salvage in (None, Copies(num_failures=1)):
        sync = Sync(Copies(num_failures=1))
        with (
            pytest.raises(ValueError, match="of the block"),
            sync.every(NEVER_S, "test", finish=Copies(), salvage=salvage),
        ):
            raise ValueError("of the block")
        assert caplog.messages == ["the store is away; what was written last is not there"]
        caplog.clear()
    with Sync(Copies(num_failures=1)).every(NEVER_S, "test"):
        pass
    assert caplog.messages == ["the store is away; what was written last is not there"]
