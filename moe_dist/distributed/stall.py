"""Whether a group still gets on, judged from where its ranks are; and the sentence that says so.

Pure functions of positions and answers: the clockwork is in `moe_dist.distributed.watchdog`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_dist.distributed.peers import Answer, Health, Peer
from moe_dist.distributed.position import FINISHED, TRAINING, Position

SLOW_PHASE_FACTOR = 6
"""Start-up, the first step, checkpoints and each batch of an evaluation may take so many times the
limit of a step."""
_NAMED_RANKS = 4
_SOURCE_LINE = re.compile(r"^\[[^\]]*\] ")


@dataclass(frozen=True)
class Stall:
    """Why a group cannot go on.

    Args:
        message: which rank, process and host, in which step and collective.
        waited_s: how long the rank that found it had been in its position, in seconds.
        lost: ranks whose processes do not answer or are gone.
    """

    message: str
    waited_s: float
    lost: tuple[Peer, ...] = ()


@dataclass(frozen=True)
class GroupState:
    """What one rank sees of the group.

    Args:
        own: this rank.
        position: where it is.
        waited_s: for how long, in seconds.
        others: the other ranks.
        answers: what each of them said, by rank.
        missing_s: how long each rank that gave no answer has been so, in seconds.
    """

    own: Peer
    position: Position
    waited_s: float
    others: Sequence[Peer]
    answers: Mapping[int, Answer]
    missing_s: Mapping[int, float]

    def with_health(self, health: Health) -> tuple[Peer, ...]:
        """Pick the other ranks whose process is in such health."""
        return tuple(peer for peer in self.others if self.answers[peer.rank].health is health)


def judge(state: GroupState, *, step_timeout_s: float) -> Stall | None:
    """Decide whether to wait any longer.

    A rank that is gone ends the wait at once; one that does not answer, after a step's limit,
    whatever phase this rank is in. Where all answer, the wait ends when this rank has been in its
    position beyond what its phase allows, unless a rank still works within its own limit.

    Args:
        state: of the group.
        step_timeout_s: how long a step may stand still, in seconds.

    Returns:
        None to wait on.
    """
    patience_s = {Health.GONE: min(2.0, step_timeout_s / 4), Health.SILENT: step_timeout_s / 4}
    lost = [
        peer
        for health, needed_s in patience_s.items()
        for peer in state.with_health(health)
        if state.missing_s[peer.rank] >= needed_s
        and (health is Health.GONE or state.waited_s >= step_timeout_s)
    ]
    if lost:
        return lost_ranks(state, lost)
    limit_s = _limit(state.position, step_timeout_s)
    if state.waited_s < limit_s:
        return None
    if state.waited_s < SLOW_PHASE_FACTOR * step_timeout_s and _someone_works(
        state, step_timeout_s
    ):
        return None
    return Stall(_who_stalls(state, limit_s), state.waited_s)


def lost_ranks(state: GroupState, lost: Sequence[Peer], cause: str = "") -> Stall:
    """Say which ranks are lost, and where this rank waited; `cause` quotes the collective."""
    found = "; ".join(f"{peer} {state.answers[peer.rank].health.value}" for peer in lost)
    doing = (
        f"waited in {state.position}" if state.position.collective else f"was in {state.position}"
    )
    seen_by = f"{state.own} {doing} for {state.waited_s:.1f} s"
    # Of a backend's text, which may hold a line of its source and advice, one sentence.
    sentence = _SOURCE_LINE.sub("", cause.splitlines()[-1]).partition(". ")[0] if cause else ""
    message = f"{found}; {seen_by}" + (f" ({sentence})" if sentence else "")
    return Stall(message, state.waited_s, tuple(lost))


def _limit(position: Position, step_timeout_s: float) -> float:
    return step_timeout_s * (1 if position.phase == TRAINING else SLOW_PHASE_FACTOR)


def _someone_works(state: GroupState, step_timeout_s: float) -> bool:
    """Whether a rank computes within its own limit, so that the others wait with reason."""
    positions = [
        answer.position for answer in state.answers.values() if answer.position is not None
    ]
    return any(
        not position.collective
        and position.phase != FINISHED
        and position.since < _limit(position, step_timeout_s)
        for position in positions
    )


def _who_stalls(state: GroupState, limit_s: float) -> str:
    """Name the ranks that compute while others wait, or all where all wait."""
    positions = {state.own: state.position._replace(since=state.waited_s)}
    for peer in state.others:
        position = state.answers[peer.rank].position
        if position is not None:
            positions[peer] = position
    working = [peer for peer, position in positions.items() if not position.collective]
    waiting = [peer for peer, position in positions.items() if position.collective]
    culprits = working or waiting
    parts = [f"{peer} stalls in {_since(positions[peer])}" for peer in culprits[:_NAMED_RANKS]]
    if working:
        parts += [f"{peer} waits in {_since(positions[peer])}" for peer in waiting[:_NAMED_RANKS]]
    mute = state.with_health(Health.UNKNOWN)
    parts += [f"{peer} {Health.UNKNOWN.value}" for peer in mute[:_NAMED_RANKS]]
    unnamed = len(positions) + len(mute) - len(parts)
    parts += [f"and {unnamed} more ranks"] if unnamed > 0 else []
    return "; ".join(parts) + f" (limit {limit_s:g} s)"


def _since(position: Position) -> str:
    return f"{position} for {position.since:.1f} s"
