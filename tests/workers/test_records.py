"""A job's records where driver and workers share no directory."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import pytest

from moe_dist.distributed.peers import Peer, Roster
from moe_dist.distributed.stall import Stall
from moe_dist.errors import StorageError
from moe_dist.storage import Store
from moe_dist.workers.attempts import FILES, next_attempt, note_attempt, note_fault, read_restarts
from moe_dist.workers.records import Records, RemoteRecords, local_records, open_records

ROSTER = Roster(1, "", (Peer(0, 100, "a"), Peer(1, 101, "b")))


@pytest.fixture
def uri() -> str:
    return f"memory://{uuid.uuid4().hex}/stage"


def test_a_local_directory_is_used_as_it_is(tmp_path: Path) -> None:
    records = open_records(tmp_path, "ray")
    assert type(records) is Records
    assert (records.location, records.directory) == (str(tmp_path / "ray"), tmp_path / "ray")
    threads = threading.active_count()
    with local_records(records.location) as same:
        assert same.directory == records.directory
        assert threading.active_count() == threads


def test_what_workers_note_reaches_the_driver_and_the_next_attempt(uri: str) -> None:
    driver = open_records(uri, "ray")
    with local_records(driver.location) as rank_0, local_records(driver.location) as rank_1:
        note_attempt(rank_0.directory, ROSTER)
        rank_0.push()
        note_fault(rank_1.directory, 1, Stall("rank 0 is gone", 2.0))
        rank_1.push()
        # The second to find out does not overwrite the first, as in a directory that is shared.
        note_fault(rank_0.directory, 1, Stall("rank 1 is gone", 1.0))
    driver.pull()
    (restart,) = read_restarts(driver.directory)
    assert restart.reason == "rank 0 is gone"
    with local_records(driver.location) as again:
        assert next_attempt(again.directory) == 2

    store = Store(driver.location)
    store.write("checkpoint_manager_snapshot.json", b"{}")
    store.write("deep/fault-1.json", b"{}")
    driver.clear(FILES)
    assert list(driver.directory.iterdir()) == []
    kept = ["checkpoint_manager_snapshot.json", "deep/fault-1.json"]
    assert [entry.name for entry in store.list()] == kept


def test_notes_that_cannot_be_pushed_go_with_the_next_ones(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RemoteRecords(f"{uri}/ray")
    note_attempt(records.directory, ROSTER)
    write = Store.write

    def refuse(store: Store, name: str, content: bytes) -> None:
        raise StorageError(f"cannot write {name}")

    monkeypatch.setattr(Store, "write", refuse)
    records.push()
    assert Store(records.location).list() == []
    monkeypatch.setattr(Store, "write", write)
    records.push()
    driver = RemoteRecords(records.location)
    driver.pull()
    assert next_attempt(driver.directory) == 2
