"""What is known of a job's attempts: its processes, why one ended, and how the next one began.

    <records>/attempts.jsonl   one line for each attempt, by its rank 0
    <records>/workers.jsonl    one line for each rank of each attempt: rank, pid, host, time
    <records>/timeline.jsonl   when rank 0 of an attempt entered which phase, up to its first step
    <records>/fault-<n>.json   why attempt n ended, by the rank that found it out first

Times in these files are Unix times.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.distributed.peers import Peer, Roster
from moe_dist.distributed.position import FIRST_STEP, LOAD_CHECKPOINT, TRAINING
from moe_dist.distributed.stall import Stall
from moe_dist.workers.job_errors import STOPPED_NAME, died, last_line, write_first

ATTEMPTS_NAME = "attempts.jsonl"
WORKERS_NAME = "workers.jsonl"
_TIMELINE_NAME = "timeline.jsonl"
FILES = (STOPPED_NAME, ATTEMPTS_NAME, WORKERS_NAME, _TIMELINE_NAME, "fault-*.json")
"""All that an earlier run of a job may have left, as patterns."""
_PROCESS, _JOB = "process", "job"
# What ends with the beginning of each event, in the words of the report.
_PARTS = {
    _PROCESS: "stop",
    _JOB: "start",
    LOAD_CHECKPOINT: "load",
    FIRST_STEP: "checkpoint",
    TRAINING: "first step",
}


@dataclass(frozen=True)
class Restart:
    """A failure that was survived, or is being survived.

    Args:
        attempt: the attempt that failed, counted from 1.
        reason: which rank, process and host failed, and where; empty where no rank was left to
            find out.
        parts: seconds from the failure to the next training step, by what they went into:
            `detect` (how long the rank that found it had waited), `stop` (until the new process
            exists), `start` (its imports and process group), `load` (job, data and model),
            `checkpoint` and `first step`. Parts that did not happen (yet) are missing.
    """

    attempt: int
    reason: str
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def is_over(self) -> bool:
        """Whether training goes on again."""
        return _PARTS[TRAINING] in self.parts

    @property
    def timing(self) -> str:
        """The parts, in words."""
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"{self.seconds:.1f} s ({shown})"

    def __str__(self) -> str:
        return f"{self.reason or 'a worker died'}; restarted in {self.timing}"


def next_attempt(records: Path) -> int:
    """Give the number of the attempt that begins, from 1."""
    return 1 + len(_read_lines(records / ATTEMPTS_NAME))


def note_attempt(records: Path, roster: Roster) -> None:
    """Leave word that the workers have begun, and which processes they are; on rank 0.

    Args:
        records: the job's directory.
        roster: the processes.
    """
    now, attempt = time.time(), roster.attempt
    _append(
        records / WORKERS_NAME,
        *(
            {"attempt": attempt, "rank": peer.rank, "pid": peer.pid, "host": peer.host, "time": now}
            for peer in roster.peers
        ),
    )
    _append(
        records / ATTEMPTS_NAME, {"time": now, "pid": os.getpid(), "world_size": len(roster.peers)}
    )
    started = {"attempt": attempt, "event": _PROCESS, "time": _process_start(now)}
    _append(records / _TIMELINE_NAME, started, {"attempt": attempt, "event": _JOB, "time": now})


class PhaseNotes:
    """Leaves word of when an attempt first entered the phases up to training; on rank 0.

    Args:
        records: the job's directory.
        attempt: its number.
    """

    def __init__(self, records: Path, attempt: int) -> None:
        self._path = records / _TIMELINE_NAME
        self._attempt = attempt
        self._awaited = set(_PARTS)

    def __call__(self, phase: str) -> None:
        """Take note of a phase that begins, the first time."""
        if phase in self._awaited:
            self._awaited.remove(phase)
            with suppress(OSError):  # A full disk is no matter here.
                _append(self._path, {"attempt": self._attempt, "event": phase, "time": time.time()})


def note_fault(records: Path, attempt: int, stall: Stall) -> None:
    """Leave word of why an attempt ends, unless another rank has."""
    note = {"message": stall.message, "waited_s": stall.waited_s, "time": time.time()}
    with suppress(OSError):
        write_first(records / f"fault-{attempt}.json", note)


def note_deaths(records: Path, failures: Mapping[int, BaseException]) -> None:
    """Leave word of workers that died, where no other rank lived long enough to tell it.

    Args:
        records: the job's directory.
        failures: what each failed worker's error was, by rank, as the one who placed them saw it.
    """
    workers = _read_lines(records / WORKERS_NAME)
    if not workers:
        return
    attempt = workers[-1]["attempt"]
    known = {w["rank"]: Peer(w["rank"], w["pid"], w["host"]) for w in workers}
    causes = {rank: died(failure) for rank, failure in failures.items()}
    # Errors that other ranks raise at the same time are the echo of a death.
    dead = {rank: cause for rank, cause in causes.items() if cause}
    shown = dead or {rank: last_line(failure) for rank, failure in failures.items()}
    parts = [f"{known.get(rank, f'rank {rank}')} {what}" for rank, what in shown.items()]
    note_fault(records, attempt, Stall("; ".join(parts), 0.0))


def read_restarts(records: Path) -> list[Restart]:
    """Join what is known of the failures so far.

    Args:
        records: the job's directory.

    Returns:
        One entry for each attempt that failed, oldest first.
    """
    num_attempts = len(_read_lines(records / ATTEMPTS_NAME))
    timeline = _read_lines(records / _TIMELINE_NAME)
    restarts = []
    for attempt in range(1, num_attempts + 1):
        fault = _read_fault(records, attempt)
        if fault is None and attempt == num_attempts:
            continue
        events = {
            line["event"]: line["time"] for line in timeline if line["attempt"] == attempt + 1
        }
        reason = "" if fault is None else str(fault["message"])
        restarts.append(Restart(attempt, reason, _parts(fault, events)))
    return restarts


def _parts(fault: Mapping[str, Any] | None, events: Mapping[str, float]) -> dict[str, float]:
    parts: dict[str, float] = {}
    before = None
    if fault is not None:
        parts["detect"], before = float(fault["waited_s"]), float(fault["time"])
    for event, part in _PARTS.items():
        if event not in events:
            break
        if before is not None:
            parts[part] = max(0.0, events[event] - before)
        before = events[event]
    return parts


def _read_fault(records: Path, attempt: int) -> dict[str, Any] | None:
    try:
        note = json.loads((records / f"fault-{attempt}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return dict(note)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file that may be growing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _append(path: Path, *lines: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines))


def _process_start(now: float) -> float:
    """Return when this process was started, or `now` where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # Since the machine was started.
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    return now
