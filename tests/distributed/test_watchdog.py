"""A group with a rank that stalls, is stopped or dies: the others end in time and name it."""

from __future__ import annotations

import json
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from moe_dist.distributed.device_queue import mark_of_queue
from moe_dist.distributed.peers import Answer, Health, Listener, Peer, ask, own_peer
from moe_dist.distributed.position import (
    FINISHED,
    TRAINING,
    Position,
    begin_step,
    collective,
    current_position,
    enter_phase,
    follow_device,
    follow_phases,
    mark_calls,
)
from moe_dist.distributed.stall import GroupState, Stall, judge
from moe_dist.distributed.watchdog import EXIT_CODE, group_timeout_s
from tests.distributed.watched import BAD_RANK, run_rank

LIMIT_S = 2.0
Ranks = list[BaseProcess]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Ranks]:
    context = multiprocessing.get_context("forkserver")

    def start(fault: str, world_size: int = 2, *, shared: bool = False) -> Ranks:
        told = (str(tmp_path), fault, LIMIT_S, shared)
        ranks: Ranks = [
            context.Process(target=run_rank, args=(rank, world_size, *told))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        return ranks

    return start


def ended(ranks: Ranks, timeout_s: float = 120) -> list[int | None]:
    end = time.monotonic() + timeout_s
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"{process} did not end by itself")
    return [process.exitcode for process in ranks]


def reason(directory: Path) -> str:
    return str(json.loads((directory / "fault-1.json").read_text())["message"])


@pytest.mark.distributed
def test_rank_that_sleeps_in_forward_is_named(start: Callable[..., Ranks], tmp_path: Path) -> None:
    ranks = start("sleeps", world_size=3)
    codes = ended(ranks)
    message = reason(tmp_path)
    # Who ends first takes the connections of the others down; they may end by that error.
    assert EXIT_CODE in codes and 0 not in codes
    assert f"rank 1 (host {socket.gethostname()}, pid {ranks[BAD_RANK].pid}) stalls" in message
    assert "stalls in training, step 3 for" in message
    assert "waits in sum of gradients (number 1) of training, step 3" in message


@pytest.mark.distributed
@pytest.mark.parametrize("shared", [False, True])
def test_stopped_rank_is_named_and_ended(
    start: Callable[..., Ranks], tmp_path: Path, shared: bool
) -> None:
    ranks = start("is stopped", shared=shared)
    assert ended(ranks) == [EXIT_CODE, -signal.SIGKILL]
    note = json.loads((tmp_path / "fault-1.json").read_text())
    assert f"pid {ranks[BAD_RANK].pid}) does not answer; rank 0" in note["message"]
    assert "waited in sum of gradients (number 1) of training, step 3" in note["message"]
    # Its limit, and the time between two looks.
    assert LIMIT_S <= note["waited_s"] < LIMIT_S + 10


@pytest.mark.distributed
@pytest.mark.parametrize("shared", [False, True])
def test_dead_rank_is_named(start: Callable[..., Ranks], tmp_path: Path, shared: bool) -> None:
    ranks = start("dies", shared=shared)
    codes = ended(ranks)
    assert codes[BAD_RANK] == -signal.SIGKILL and codes[0] != 0
    message = reason(tmp_path)
    assert f"pid {ranks[BAD_RANK].pid}) is gone; rank 0" in message
    assert "sum of gradients (number 1) of training, step 3" in message
    assert "pair.cc" not in message and "\n" not in message


@pytest.mark.distributed
def test_slow_evaluation_and_jumping_clock_are_no_stall(
    start: Callable[..., Ranks], tmp_path: Path
) -> None:
    assert ended(start("clock jumps")) == [0, 0]
    assert not (tmp_path / "fault-1.json").exists()
    assert (tmp_path / "finished-0").exists() and (tmp_path / "finished-1").exists()


def test_only_who_knows_the_token_is_answered() -> None:
    follow_phases(None)
    listener = Listener("127.0.0.1")
    listener.start("secret")
    enter_phase("evaluation")
    peer = own_peer(listener)
    answer = ask(peer, "secret")
    assert answer.health is Health.ANSWERS and answer.position is not None
    assert answer.position.phase == "evaluation" and 0 <= answer.position.since < 60
    assert ask(peer, "public").position is None
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    with silent:
        stopped = Peer(0, 1, "here", "127.0.0.1", port)
        assert ask(stopped, "secret", patience_s=0.1).health is Health.SILENT
    assert ask(Peer(0, 1, "here", "127.0.0.1", port), "secret").health is Health.GONE


def test_marks_nest_and_cost_little() -> None:
    class Foreign:
        def reduce(self, position: list[Position]) -> int:
            position.append(current_position())
            return 5

    follow_phases(None)
    enter_phase(TRAINING)
    begin_step(4)
    foreign, seen = Foreign(), list[Position]()
    mark_calls(foreign, "reduce", "reduction")
    with collective("update"):
        assert foreign.reduce(seen) == 5
        assert current_position().collective == "update"
    assert str(seen[0]) == "reduction (number 2) of training, step 4"
    assert str(current_position()) == "training, step 4"
    with pytest.raises(RuntimeError), collective("sum"):
        raise RuntimeError("lost")
    assert current_position().collective == "sum"  # for the message about it
    start = time.perf_counter()
    for _ in range(1000):
        with collective("sum"):
            pass
    assert time.perf_counter() - start < 0.1  # 2 µs each on a quiet machine


def test_a_collective_lasts_until_the_gpu_is_through_with_it() -> None:
    is_through: dict[int, bool] = {}

    def mark() -> Callable[[], bool]:
        number = len(is_through)
        is_through[number] = False
        return lambda: is_through[number]

    follow_phases(None)
    enter_phase(TRAINING)
    begin_step(4)
    follow_device(mark)
    try:
        # As with NCCL: the calls return at once, and then the host waits for the loss.
        for name in ("reduction", "norm"):
            with collective(name):
                pass
        here = current_position()
        assert str(here) == "reduction (number 1) of training, step 4"
        assert here == current_position() and judge_alone(here) is not None
        is_through[0] = True
        assert current_position().collective == "norm"
        with collective("counts"):
            assert current_position().collective == "counts"
        is_through.update(dict.fromkeys(is_through, True))
        assert str(current_position()) == "training, step 4"
    finally:
        follow_device(None)
    with collective("sum"):
        pass
    assert not current_position().collective


def judge_alone(position: Position) -> Stall | None:
    """What a rank says that waits in a collective while another one computes for too long."""
    return judge(group(11, position, alive(TRAINING, "", 11)), step_timeout_s=10)


def test_gloo_needs_no_marks() -> None:
    assert mark_of_queue() is None


def group(
    waited_s: float, position: Position, *answers: Answer, missing_s: float = 0.0
) -> GroupState:
    others = [Peer(rank, 100 + rank, "b") for rank in range(1, len(answers) + 1)]
    given = dict(enumerate(answers, start=1))
    missing = {rank: missing_s for rank, answer in given.items() if answer.position is None}
    return GroupState(Peer(0, 100, "a"), position, waited_s, others, given, missing)


def alive(phase: str, collective: str, for_s: float) -> Answer:
    return Answer(Health.ANSWERS, Position(phase, 7, collective, 1, for_s))


WAITS = Position(TRAINING, 7, "sum", 1)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (group(9, WAITS, alive(TRAINING, "", 9)), None),
        (group(11, WAITS, alive(TRAINING, "", 11)), "rank 1 (host b, pid 101) stalls in training"),
        # Rank 1 works within its own limit: since less, or at something that may take longer.
        (group(11, WAITS, alive(TRAINING, "", 9)), None),
        (group(59, WAITS, alive("checkpoint", "", 59)), None),
        (group(61, WAITS, alive("checkpoint", "", 59)), "rank 1 (host b, pid 101) stalls in check"),
        (group(11, WAITS, alive(FINISHED, "", 1)), "stalls in the end of the job"),
        # All wait, each in another collective: all are named.
        (group(11, WAITS, alive(TRAINING, "norm", 11)), "rank 0 (host a, pid 100) stalls in sum"),
        (group(11, Position("evaluation", 7), alive("evaluation", "sum", 11)), None),
        (group(1, WAITS, Answer(Health.GONE), missing_s=0.1), None),
        (group(1, WAITS, Answer(Health.GONE), missing_s=3), "rank 1 (host b, pid 101) is gone"),
        (group(9, WAITS, Answer(Health.SILENT), missing_s=9), None),
        (group(11, WAITS, Answer(Health.SILENT), missing_s=9), "rank 1 (host b, pid 101) does not"),
        # A stopped process is not waited for six times as long in a slow phase.
        (
            group(11, Position("checkpoint", 7, "sum", 1), Answer(Health.SILENT), missing_s=9),
            "checkp",
        ),
        # From the silence of one that never could be asked nothing follows.
        (group(9, WAITS, Answer(Health.UNKNOWN), missing_s=9), None),
        (group(11, WAITS, Answer(Health.UNKNOWN), missing_s=11), "pid 101) could never be asked"),
        (group(61, Position("start-up")), "rank 0 (host a, pid 100) stalls in start-up for 61.0 s"),
    ],
)
def test_who_is_to_blame(seen: GroupState, expected: str | None) -> None:
    stall = judge(seen, step_timeout_s=10)
    if expected is None:
        assert stall is None
    else:
        assert stall is not None and expected in stall.message


def test_torch_waits_longer_than_the_watchdog() -> None:
    assert group_timeout_s(300) > 6 * 300
