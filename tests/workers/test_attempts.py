"""What is kept of a job's attempts, and what a restart is said to have taken."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from moe_dist.distributed.peers import Peer, Roster
from moe_dist.distributed.position import FIRST_STEP, LOAD_CHECKPOINT, TRAINING
from moe_dist.distributed.stall import Stall
from moe_dist.workers.attempts import (
    FILES,
    WORKERS_NAME,
    PhaseNotes,
    next_attempt,
    note_attempt,
    note_deaths,
    note_fault,
    read_restarts,
)
from moe_dist.workers.records import Records

PEERS = (Peer(0, 100, "a"), Peer(1, 101, "b"))


class ActorDiedError(Exception):
    """Named as Ray's."""


def begin(records: Path) -> None:
    note_attempt(records, Roster(next_attempt(records), "", PEERS))


def test_a_restart_is_told_with_its_parts(tmp_path: Path) -> None:
    begin(tmp_path)
    assert read_restarts(tmp_path) == []
    note_fault(tmp_path, 1, Stall("rank 1 is gone", 2.0))
    note_fault(tmp_path, 1, Stall("rank 0 is gone", 0.0))  # the first to find out tells it
    (failed,) = read_restarts(tmp_path)
    assert (failed.reason, failed.parts, failed.is_over) == (
        "rank 1 is gone",
        {"detect": 2.0},
        False,
    )
    begin(tmp_path)
    notes = PhaseNotes(tmp_path, 2)
    for phase in (LOAD_CHECKPOINT, FIRST_STEP, TRAINING, "evaluation", TRAINING):
        notes(phase)
    (failed,) = read_restarts(tmp_path)
    assert list(failed.parts) == ["detect", "stop", "start", "load", "checkpoint", "first step"]
    assert failed.is_over and failed.seconds == pytest.approx(sum(failed.parts.values()))
    assert str(failed).startswith("rank 1 is gone; restarted in ")
    # This process stands for the new worker: it began before the fault, so nothing is negative.
    assert all(seconds >= 0 for seconds in failed.parts.values())


def test_workers_are_listed_by_attempt(tmp_path: Path) -> None:
    before = time.time()
    begin(tmp_path)
    begin(tmp_path)
    workers = [json.loads(line) for line in (tmp_path / WORKERS_NAME).open()]
    assert [(w["attempt"], w["rank"], w["pid"], w["host"]) for w in workers] == [
        (1, 0, 100, "a"),
        (1, 1, 101, "b"),
        (2, 0, 100, "a"),
        (2, 1, 101, "b"),
    ]
    assert all(before <= w["time"] <= time.time() for w in workers)
    Records(tmp_path).clear(FILES)
    assert os.listdir(tmp_path) == [] and next_attempt(tmp_path) == 1


def test_a_death_that_no_rank_saw_is_told_by_who_placed_it(tmp_path: Path) -> None:
    note_deaths(tmp_path, {0: ActorDiedError()})  # before the workers began: nothing to tell
    assert os.listdir(tmp_path) == []
    begin(tmp_path)
    # The other rank's error is the echo.
    note_deaths(tmp_path, {0: RuntimeError("closed by peer"), 1: ActorDiedError("node")})
    begin(tmp_path)
    note_deaths(tmp_path, {0: RuntimeError("first\nlast")})
    begin(tmp_path)
    note_deaths(tmp_path, {1: ActorDiedError("NODE_OUT_OF_MEMORY")})
    begin(tmp_path)
    assert [restart.reason for restart in read_restarts(tmp_path)] == [
        "rank 1 (host b, pid 101) died",
        "rank 0 (host a, pid 100) RuntimeError: last",
        "rank 1 (host b, pid 101) was ended by Ray, as its node ran out of memory",
    ]
