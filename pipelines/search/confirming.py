"""The best trial and the recipe as it stands once more, with other seeds of the student.

The best of many trials is in part the luckiest. Other seeds (order of the rows, dropout, new gates)
on the same rows and from the same teacher tell what of its margin is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from moe_dist.search.trials import BASELINE, Report, Trial, TrialLog, rank_trials
from moe_dist.training.driver import RaySession
from moe_dist.training.search import Ruling, TrialRoom, run_sweep

from .teachers import TeacherFacts, teacher_key
from .trial import TrialRunner

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from ..console import Console

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Confirmation:
    """What other seeds say.

    Attributes:
        metric: the objective.
        best: the trial's number.
        best_values: its measures, one for each seed.
        baseline_values: those of the recipe as it stands, by the same seeds.
        difference: mean of best minus baseline, seed by seed.
        low: lower end of its interval (Student's t over seeds).
        high: upper end.
    """

    metric: str
    best: int
    best_values: tuple[float, ...]
    baseline_values: tuple[float, ...]
    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        """Say it in a sentence."""
        best, baseline = (
            f"{fmean(values):.4f} ± {stdev(values):.4f}"
            for values in (self.best_values, self.baseline_values)
        )
        claim = "it cannot be told from the noise of seeds"
        if self.low > 0 or self.high < 0:
            claim = "it is more than the noise of seeds"
        return (
            f"With {len(self.best_values)} other seeds trial {self.best} has {self.metric} {best}, "
            f"the recipe as it stands {baseline}; difference {self.difference:+.4f}, "
            f"{round(100 * CONFIDENCE)} % interval over seeds {self.low:+.4f} to {self.high:+.4f}: "
            f"{claim}."
        )


class Rerun:
    """A watcher of trials that are known beforehand; see `moe_dist.training.search.Watcher`.

    Args:
        tasks: what is to be run.
        log: keeps what is found; trials that it has are not run again.
        console: what people see.
    """

    def __init__(self, tasks: Sequence[Mapping[str, Any]], log: TrialLog, console: Console) -> None:
        self._log, self._console = log, console
        done = {number for number, trial in log.trials.items() if trial.is_over}
        self._tasks = {task["number"]: task for task in tasks if task["number"] not in done}
        self._waiting = list(self._tasks)
        self._seconds: dict[int, float] = {}

    @property
    def num_left(self) -> int:
        """Trials that are still to be run."""
        return len(self._waiting)

    def next_task(self) -> Mapping[str, Any] | None:
        """Give the next trial."""
        return self._tasks[self._waiting.pop(0)] if self._waiting else None

    def started(self, number: int) -> None:
        """Note that a trial runs."""
        task = self._tasks[number]
        self._log.started(number, {"seed": task["seed"]}, task["overrides"])

    def reported(self, number: int, report: Report, num_steps: int, seconds: float) -> None:
        """Note what it measured."""
        self._seconds[number] = seconds
        self._log.reported(number, report, num_steps)

    def ended(self, number: int, message: str = "") -> None:
        """Note that it is over."""
        status: Any = "failed" if message else "finished"
        self._log.ended(number, status, self._seconds.get(number, 0.0), message)
        if message:
            self._console.warn(f"seed {self._tasks[number]['seed']} failed: {message}")

    def is_time_up(self) -> bool:
        """Go on to the end."""
        return False


def confirm(
    config: RunConfig,
    directory: Path,
    teachers: dict[str, TeacherFacts],
    log: TrialLog,
    room: TrialRoom,
    session: RaySession,
    console: Console,
) -> Confirmation | None:
    """Train the best and the recipe as it stands with other seeds, where the recipe asks for it.

    Args:
        config: the sweep's recipe.
        directory: the sweep's.
        teachers: facts by key.
        log: the sweep's trials.
        room: where trials run.
        session: the connection to Ray.
        console: what people see.

    Returns:
        What the seeds say; None where nothing was asked, the recipe itself is the best, or fewer
        than two seeds could be trained.
    """
    search = config.search
    metric, mode = next(iter(search.wanted.items()))
    ranked = rank_trials(list(log.trials.values()), metric, mode)
    if not search.confirm_seeds or not ranked or ranked[0].number == BASELINE:
        return None
    best = ranked[0]
    console.note(
        f"trial {best.number} and the recipe as it stands, with {search.confirm_seeds} other seeds"
    )
    place = directory / "confirm" / f"trial-{best.number:04d}"
    watcher = Rerun(
        confirm_tasks(config, best, in_place=room.in_place),
        TrialLog(place / "trials.jsonl"),
        console,
    )
    if watcher.num_left:
        runner = TrialRunner(config, str(place), (1,), teachers)
        room = replace(room, num_concurrent=min(room.num_concurrent, watcher.num_left))
        ruling = Ruling("none", metric, mode, 1, search.reduction_factor)
        run_sweep(runner, watcher, ruling, room, session, num_trials=watcher.num_left)
    return judge(metric, best.number, TrialLog(place / "trials.jsonl").trials)


def confirm_tasks(config: RunConfig, best: Trial, *, in_place: bool) -> list[dict[str, Any]]:
    """List what is to be trained: even numbers are the best, odd ones the recipe as it stands.

    Args:
        config: the sweep's recipe.
        best: the best trial.
        in_place: whether a trial runs in its own actor.

    Returns:
        Tasks.
    """
    return [
        {
            "number": 2 * place + is_baseline,
            "overrides": {} if is_baseline else best.overrides,
            "teacher": teacher_key(config, {} if is_baseline else best.overrides),
            "in_place": in_place,
            "is_ruled": False,
            "seed": config.seed + 1 + place,
        }
        for place in range(config.search.confirm_seeds)
        for is_baseline in (False, True)
    ]


def judge(metric: str, best: int, trials: Mapping[int, Trial]) -> Confirmation | None:
    """Compare the two, seed by seed.

    Args:
        metric: the objective.
        best: the best trial's number.
        trials: what `confirm_tasks` became.

    Returns:
        The comparison; None for fewer than two seeds.
    """
    from scipy import stats

    pairs = [
        (trials[number].value(metric), trials[number + 1].value(metric))
        for number in sorted(trials)
        if number % 2 == 0 and number + 1 in trials
    ]
    pairs = [pair for pair in pairs if not any(math.isnan(value) for value in pair)]
    if len(pairs) < 2:
        return None
    ours, theirs = (tuple(values) for values in zip(*pairs, strict=True))
    gaps = [one - other for one, other in pairs]
    mean = fmean(gaps)
    spread = stdev(gaps) / math.sqrt(len(gaps))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * spread
    return Confirmation(metric, best, ours, theirs, mean, mean - reach, mean + reach)
