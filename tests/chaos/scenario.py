"""A run and a sequence of faults in it, drawn from a seed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.checks import Outcome, find_problems, read_outcome
from tests.chaos.faults import FAULTS
from tests.chaos.marks import Mark
from tests.chaos.recipe import CHECKPOINT_EVERY, NUM_WORKERS
from tests.chaos.run import Run, RunLost
from tests.chaos.testbeds import Testbed
from tests.chaos.trace import Attempt

# Between two faults: two checkpoints, so that one of them may be damaged.
GAP = 2 * CHECKPOINT_EVERY + 1
SPREAD = CHECKPOINT_EVERY
NUM_CHECKPOINT_FILES = 3


@dataclass
class Incident:
    """A fault in a run.

    Args:
        fault: its name in `FAULTS`.
        mark: the moment.
        struck: Unix time in s.
        resumable: the steps from which training may go on, if it has to.
        recovery_s: from the strike to the end of the next step; None if there was none.
        num_repeated: steps that were taken again.
    """

    fault: str
    mark: Mark
    struck: float
    resumable: set[int] = field(default_factory=set)
    recovery_s: float | None = None
    num_repeated: int = 0


@dataclass
class Verdict:
    """How a run with faults ended.

    Args:
        testbed: where it ran.
        incidents: what was done to it.
        problems: what is wrong; empty if nothing is.
        seconds: of the whole run.
        records: its directory of marks, traces and logs.
    """

    testbed: str
    incidents: list[Incident]
    problems: list[str]
    seconds: float
    records: Path


def draw_marks(faults: Sequence[str], draw: random.Random) -> list[Mark]:
    """Choose a moment for each fault, in order, far enough from each other."""
    marks: list[Mark] = []
    step = 0
    for number, fault in enumerate(faults):
        step += GAP + draw.randrange(SPREAD)
        point = draw.choice(FAULTS[fault].points)
        rank, part = draw.randrange(NUM_WORKERS), 0
        if point == "checkpoint":  # written by rank 0
            step += -step % CHECKPOINT_EVERY
            rank, part = 0, draw.randint(1, NUM_CHECKPOINT_FILES)
        marks.append(Mark(f"{number}-{fault.replace(' ', '-')}", step, rank, point, part))
    return marks


def steps_for(num_faults: int) -> int:
    """Return how many steps a run takes in which so many faults find room."""
    return (num_faults + 1) * (GAP + SPREAD + CHECKPOINT_EVERY)


def undisturbed(
    testbed: Testbed, recipe: dict[str, Any], prepared: Path, *, records: Path, output_dir: Path
) -> Outcome:
    """Run without faults.

    Returns:
        What came out.

    Raises:
        RunLost: if that did not end well.
    """
    name = f"undisturbed-{testbed.name}"
    run = Run(testbed, recipe, prepared, records=records, output_dir=output_dir, name=name)
    run.start()
    code = run.wait_for_end()
    if code != 0:
        raise RunLost(f"undisturbed, it ended with {code}:\n{run.log_tail()}")
    return read_outcome(run)


def disturbed(
    testbed: Testbed,
    recipe: dict[str, Any],
    prepared: Path,
    expected: Outcome,
    faults: Sequence[str],
    draw: random.Random,
    *,
    records: Path,
    output_dir: Path,
) -> Verdict:
    """Run with faults, one after the other, and check what came out.

    Args:
        testbed: where to run.
        recipe: as for the undisturbed run.
        prepared: as for the undisturbed run.
        expected: what that one gave.
        faults: names of `FAULTS`, in order.
        draw: chooses moments and details.
        records: a new directory for marks, traces and logs.
        output_dir: a new directory for the results.

    Returns:
        What was done and what is wrong.
    """
    began = time.monotonic()
    marks = draw_marks(faults, draw)
    run = Run(
        testbed,
        recipe,
        prepared,
        records=records,
        output_dir=output_dir,
        name=records.name,
        marks=marks,
    )
    incidents: list[Incident] = []
    try:
        run.start()
        for fault, mark in zip(faults, marks, strict=True):
            _strike(run, fault, mark, incidents, draw)
        code = run.wait_for_end()
        if code != 0:
            raise RunLost(f"ended with {code}:\n{run.log_tail()}")
        measure(incidents, run.trace())
        num_steps = int(recipe["train"]["max_steps"])
        problems = find_problems(run, incidents, expected, num_steps)
    except RunLost as lost:
        problems = [f"lost: {lost}"]
        if run.returncode() is None:
            run.kill_driver()
    return Verdict(testbed.name, incidents, problems, time.monotonic() - began, records)


def measure(incidents: Sequence[Incident], attempts: Sequence[Attempt]) -> None:
    """Find out from rank 0's trace what each fault cost."""
    attempts = [attempt for attempt in attempts if attempt.rank == 0 and attempt.steps]
    for number, incident in enumerate(incidents):
        following = incidents[number + 1 :]
        until = following[0].struck if following else float("inf")
        later = [t for a in attempts for t in a.times.values() if incident.struck < t]
        restarts = [a for a in attempts if incident.struck < a.began < until]
        if restarts:
            later = [t for a in restarts for t in a.times.values()]
        incident.recovery_s = min(later) - incident.struck if later else None
        for restart in restarts:
            before = attempts[attempts.index(restart) - 1]
            incident.num_repeated += max(0, before.steps[-1] - restart.steps[0] + 1)


def _strike(
    run: Run, fault: str, mark: Mark, incidents: list[Incident], draw: random.Random
) -> None:
    reached = run.wait_for(mark)
    incident = Incident(fault, mark, time.time())
    if not FAULTS[fault].damages:
        incident.resumable.add(run.newest_checkpoint())
    incidents.append(incident)
    FAULTS[fault].strike(run, reached, draw)
    # A checkpoint that was under way may have become whole meanwhile.
    incident.resumable.add(run.newest_checkpoint())
