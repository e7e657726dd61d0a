"""Ends a process whose group no longer gets on, and leaves word of which rank is to blame.

A collective waits for every rank, and waits for ever where one is stopped, cut off or (with NCCL)
dead; no exception can reach a thread that waits in it. So each rank has a thread that looks at how
long the present position (`moe_dist.distributed.position`) has lasted, asks the other ranks where
they are (`peers`), judges (`stall`), leaves word and ends its process. Whoever started the
processes then sees one die, as with any crash, and starts all of them again.

Times are monotonic, each taken on one host, so that clocks may differ or jump.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

from moe_dist.distributed.peers import Answer, Health, Peer, Roster, ask
from moe_dist.distributed.position import FINISHED, Position, current_position, enter_phase
from moe_dist.distributed.stall import SLOW_PHASE_FACTOR, GroupState, Stall, judge, lost_ranks

EXIT_CODE = 75
_QUIET_S = 5.0
_PATIENCE_S = 2.0
_NOTE_LIMIT_S = 10.0
_MAX_QUESTIONS = 32
_GREETINGS = 10
_GREET_EVERY_S = 1.0
_DEATH_LOOKS = 5
_DEATH_LOOK_EVERY_S = 0.2


def group_timeout_s(step_timeout_s: float) -> float:
    """Return how long a collective may last before torch itself gives up, in seconds.

    That is beyond all that a watchdog allows, since it names the culprit and torch cannot.
    """
    return (SLOW_PHASE_FACTOR + 1) * step_timeout_s + 60.0


class Watchdog:
    """Watches over this process's part in a group, as long as its `with` block lasts.

    Args:
        roster: all ranks; each has a `Listener` that answers.
        rank: this process's.
        step_timeout_s: how long a training step may stand still, in seconds; other work has
            `SLOW_PHASE_FACTOR` times as long.
        note: leaves word where the starter of the processes finds it; called once at most.
        end: ends this process.
    """

    def __init__(
        self,
        roster: Roster,
        rank: int,
        *,
        step_timeout_s: float,
        note: Callable[[Stall], None],
        end: Callable[[], None] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        self._token = roster.token
        self._own = roster.peers[rank]
        self._others = [peer for peer in roster.peers if peer.rank != rank]
        self._limit_s = step_timeout_s
        self._patience_s = min(_PATIENCE_S, step_timeout_s / 4)
        self._note = note
        self._end = end
        self._reached: set[int] = set()
        self._missing_since: dict[int, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Begin to watch; the others are greeted first, while they surely live."""
        self._ask_all()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching; the process goes on answering the others."""
        self._done.set()
        if kind is None:
            enter_phase(FINISHED)

    def explain(self, fault: BaseException) -> Stall | None:
        """Find which ranks are lost behind a collective's error, and leave word of it.

        None where every rank still answers.
        """
        position, waited_s = _position_and_wait()
        self._done.set()
        self._thread.join()
        cause = str(fault).strip() or type(fault).__name__
        for _ in range(_DEATH_LOOKS):
            state = self._look(position, waited_s)
            lost = state.with_health(Health.GONE) + state.with_health(Health.SILENT)
            if lost:
                stall = lost_ranks(state, lost, cause=cause)
                self._note(stall)
                return stall
            # The kernel closes a dying process's connections one after the other.
            time.sleep(_DEATH_LOOK_EVERY_S)
        return None

    def _greet(self) -> None:
        """Find out who can be asked at all: nothing is concluded from another's silence."""
        for _ in range(_GREETINGS):
            if len(self._reached) == len(self._others) or self._done.wait(_GREET_EVERY_S):
                return
            self._ask_all()
        mute = [str(peer) for peer in self._others if peer.rank not in self._reached]
        sys.stderr.write(f"watchdog: no way from {self._own} to {', '.join(mute)}\n")

    def _watch(self) -> None:
        self._greet()
        quiet_s = min(_QUIET_S, self._limit_s / 4)
        while not self._done.wait(quiet_s / 4):
            position, waited_s = _position_and_wait()
            if waited_s < quiet_s:  # This rank gets on: nothing is asked of anybody.
                self._missing_since.clear()
                continue
            stall = judge(self._look(position, waited_s), step_timeout_s=self._limit_s)
            if stall is None or current_position() != position or self._done.is_set():
                continue
            self._leave_word(stall)
            self._kill(stall.lost)
            self._end()
            return

    def _look(self, position: Position, waited_s: float) -> GroupState:
        answers = self._ask_all()
        now = time.monotonic()
        for rank, answer in answers.items():
            if answer.health is Health.ANSWERS:
                self._missing_since.pop(rank, None)
            else:
                self._missing_since.setdefault(rank, now)
        missing_s = {rank: now - since for rank, since in self._missing_since.items()}
        return GroupState(self._own, position, waited_s, self._others, answers, missing_s)

    def _ask_all(self) -> dict[int, Answer]:
        with ThreadPoolExecutor(max_workers=_MAX_QUESTIONS) as pool:
            answers = pool.map(self._ask, self._others)
            return {peer.rank: answer for peer, answer in zip(self._others, answers, strict=True)}

    def _ask(self, peer: Peer) -> Answer:
        known = peer.rank in self._reached
        answer = ask(peer, self._token, patience_s=self._patience_s if known else _PATIENCE_S)
        if answer.health is Health.ANSWERS:
            self._reached.add(peer.rank)
        elif not known:
            return Answer(Health.UNKNOWN)
        return answer

    def _leave_word(self, stall: Stall) -> None:
        """Tell it in a thread of its own: storage that hangs must not keep this process alive."""
        sys.stderr.write(f"watchdog: {stall.message}\n")
        sys.stderr.flush()
        writing = threading.Thread(target=self._note, args=(stall,), daemon=True)
        writing.start()
        writing.join(_NOTE_LIMIT_S)

    def _kill(self, lost: tuple[Peer, ...]) -> None:
        """End stopped processes of this machine, which nobody else may be able to end."""
        for peer in lost:
            if peer.machine and peer.machine == self._own.machine:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(peer.pid, signal.SIGKILL)


def _position_and_wait() -> tuple[Position, float]:
    position = current_position()
    return position, time.monotonic() - position.since
