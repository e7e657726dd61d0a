"""The driver's side of a sweep: proposes trials, keeps records, tells MLflow and people."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.config import RunConfig
from moe_dist.config.checks import find_cross_faults
from moe_dist.config.in_flight import changes_in_flight
from moe_dist.config.search_checks import point_settings
from moe_dist.config.search_space import Point, parse_space
from moe_dist.search.objectives import is_better
from moe_dist.search.perturbing import perturb
from moe_dist.search.trials import BASELINE, Report, Status, Trial, TrialLog

from ..chain.fingerprints import value_digest
from ..console import duration
from .rungs import rung_times
from .teachers import teacher_key
from .trial import trial_name
from .trial_stages import TrialStages, clear_stages

if TYPE_CHECKING:
    from moe_dist.search.proposers import Proposer
    from moe_dist.tracking import TrackedRun

    from ..chain.files import ResultFiles
    from ..console import Console

TRIALS_DIRECTORY = "trials"
IN_FLIGHT_PREFIX = "in_flight/"
"""In front of the values that a trial of a population goes on with, among its run's metrics."""
FOLLOW_S = 1.0
MAX_DRAWS = 50
TAGGED = ("moe.router", "moe.partition", "moe.num_shared_neurons", "seed")


class Supervisor:
    """Proposes trials and keeps what becomes of them; see `moe_dist.search.tune.Watcher`.

    Args:
        config: the recipe.
        directory: the sweep's.
        log: its trials.
        proposer: where points come from.
        tracker: the sweep's run.
        console: what people see.
        files: the sweep's.
        seconds_before: what earlier parts of the sweep took.
        in_place: whether a trial runs in its own actor.
        tags: of every trial's run.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        log: TrialLog,
        proposer: Proposer,
        tracker: TrackedRun,
        console: Console,
        files: ResultFiles,
        *,
        seconds_before: float = 0.0,
        in_place: bool = True,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._config, self._directory, self._log = config, directory, log
        self._proposer, self._tracker, self._console = proposer, tracker, console
        self._files, self._in_place, self._tags = files, in_place, dict(tags or {})
        self._metric, self._mode = next(iter(config.search.wanted.items()))
        self._points: dict[int, Point] = {}
        self._runs: dict[int, TrackedRun] = {}
        self._stages: dict[int, TrialStages] = {}
        self._followed = 0.0
        self._seconds: dict[int, float] = {}
        self._dimensions, _ = parse_space(config.search.space)
        self._again = [number for number, trial in log.trials.items() if not trial.is_over]
        self._next = 1 + max(log.trials, default=BASELINE)
        self._seconds_before = seconds_before
        self._begin: float | None = None
        self._time_is_up = False
        self._workers_of: dict[int, int] = {}
        self._num_rungs = len(rung_times(config.search))
        self._num_trials = self.num_left + sum(trial.is_over for trial in log.trials.values())
        self.ran_out = False
        """Whether the space had fewer points than trials were asked for."""

    @property
    def num_left(self) -> int:
        """Trials that are still to be run, baseline included."""
        search = self._config.search
        new = max(0, search.num_trials - (self._next - 1))
        baseline = int(search.baseline and BASELINE not in self._log.trials)
        return new + baseline + len(self._again)

    @property
    def seconds(self) -> float:
        """What the sweep has taken, earlier parts included."""
        now = 0.0 if self._begin is None else time.monotonic() - self._begin
        return self._seconds_before + now

    def next_task(self) -> dict[str, Any] | None:
        """Give the next trial's task: interrupted ones first, then the recipe's own."""
        if self._begin is None:
            self._begin = time.monotonic()
            self._show()
        search = self._config.search
        if self.is_time_up() or self._is_spent():
            return None
        if self._again:
            number = self._again.pop(0)
            trial = self._log.trials[number]
            point: Point | None = Point(trial.drawn, trial.overrides)
        elif search.baseline and not {BASELINE} & {*self._log.trials, *self._points}:
            number, point = BASELINE, Point()
        elif self._next <= search.num_trials:
            number = self._next
            point = self._proposer.propose(number)
            self._next += 1
        else:
            return None
        if point is None:
            self.ran_out = True
            return None
        clear_stages(self._trial_directory(number), self._files)
        return self._task(number, point)

    def breed(self, weak: int, strong: int, step: int) -> dict[str, Any]:
        """Let a weak trial follow a strong one; see `moe_dist.search.population.Population`.

        From `step` on it takes over the strong trial's weights, and values near its own.
        Returns the weak trial's task from now on.
        """
        point = self._near(self._log.trials[strong], f"{self._config.seed}-{weak}-{step}")
        self._log.took_over(weak, strong, step, point.drawn, point.overrides)
        self._log_moving(weak, step, point)
        tags = point_tags(self._config, point.overrides)
        self._runs[weak].set_tags(tags | {"follows": trial_name(strong)})
        self._console.note(
            f"{trial_name(weak)}: goes on from {trial_name(strong)} at step {step}  "
            f"{_said(point.drawn)}"
        )
        return self._task(weak, point)

    def _near(self, trial: Trial, chance: str) -> Point:
        """Move a trial's values to a sound recipe nearby."""
        generator = random.Random(chance)
        for _ in range(MAX_DRAWS):
            point = perturb(self._dimensions, self._config, trial.drawn, generator)
            raw = point_settings(self._config, point.overrides)
            if not find_cross_faults(RunConfig.model_validate(raw)):
                return point
        return Point(trial.drawn, trial.overrides)

    def _log_moving(self, number: int, step: int, point: Point) -> None:
        """Show in the trial's run what it has from a step on of what can change in flight."""
        moving = {
            f"{IN_FLIGHT_PREFIX}{path}": float(value)
            for path, value in point.overrides.items()
            if self._config.search.is_population and changes_in_flight(path) and value is not None
        }
        if moving:
            self._runs[number].log_metrics(step, moving)

    def _task(self, number: int, point: Point) -> dict[str, Any]:
        self._points[number] = point
        return {
            "number": number,
            "overrides": point.overrides,
            "teacher": teacher_key(self._config, point.overrides),
            "in_place": self._in_place,
            "is_ruled": number != BASELINE,
        }

    def started(self, number: int) -> None:
        """Note that a trial runs, and open its run."""
        point = self._points[number]
        self._log.started(number, point.drawn, point.overrides)
        run = self._runs[number] = self._open_run(number, point.drawn, point.overrides).__enter__()
        self._stages[number] = TrialStages(
            run, self._trial_directory(number), _fingerprint(number, point.overrides), self._files
        )
        tags = {**self._tags, **point_tags(self._config, point.overrides)}
        run.set_tags({**tags, "trial": str(number), "best": "false"})
        self._log_moving(number, 0, point)
        what = "the recipe as it stands" if number == BASELINE else _said(point.drawn)
        self._console.note(f"{trial_name(number)}: {what}")
        self._show()

    def reported(self, number: int, report: Report, num_steps: int, seconds: float) -> None:
        """Note what a trial measured."""
        self._seconds[number] = seconds
        self._log.reported(number, report, num_steps)
        self._stages[number].measured(report.step, report.metrics)
        value = report.metrics.get(self._metric, math.nan)
        self._console.note(
            f"{trial_name(number)}: step {report.step}/{num_steps}  {self._metric} {value:.4g}"
            f"{self._best_words()}"
        )
        self._show()

    def ended(self, number: int, message: str = "") -> None:
        """Note that a trial is over, or that it failed."""
        trial = self._log.trials[number]
        is_whole = trial.num_steps > 0 and trial.steps_done >= trial.num_steps
        run, stages = self._runs[number], self._stages.pop(number)
        if not message and not is_whole and self._time_is_up:
            # Not its fault: it goes on when the sweep does.
            stages.end("KILLED")
            run.__exit__(KeyboardInterrupt, None, None)
            return
        seconds = self._seconds.get(number, 0.0)
        status: Status = "failed" if message else "finished" if is_whole else "stopped"
        self._log.ended(number, status, seconds, message)
        stages.end("FAILED" if message else "FINISHED")
        run.set_tags({"trial_status": status} | ({"failure": message[:500]} if message else {}))
        run.__exit__(RuntimeError if message else None, None, None)
        self._proposer.tell(trial)
        best = self._log_best()
        if best is not None:
            over = sum(one.status != "running" for one in self._log.trials.values())
            self._tracker.log_metrics(over, {f"best/{self._metric}": best})
        if message:
            self._console.warn(f"{trial_name(number)} failed: {message}")
        elif status == "stopped":
            self._console.note(f"{trial_name(number)}: ended early, after {duration(seconds)}")
        self._show()

    def is_time_up(self) -> bool:
        """Tell whether the time budget is spent; asked all the time while trials run."""
        if time.monotonic() - self._followed > FOLLOW_S:
            for stages in self._stages.values():
                stages.follow()
            self._followed = time.monotonic()
        budget = self._config.search.time_budget_s
        if not self._time_is_up and budget is not None and self.seconds > budget:
            self._time_is_up = True
            self._console.note(f"search.time_budget_s={budget:g} is spent; the sweep ends here")
        return self._time_is_up

    def close(self) -> None:
        """Close the runs of trials that were cut off; they go on with the same command."""
        self._console.close()
        for number, run in self._runs.items():
            if self._log.trials[number].status == "running":
                with suppress(Exception):
                    if number in self._stages:
                        self._stages[number].end("KILLED")
                    run.__exit__(KeyboardInterrupt, None, None)

    def mark_best(self, best: int) -> None:
        """Mark one trial's run as the best, and no other."""
        for number, trial in self._log.trials.items():
            run = self._runs.get(number)
            mark = self._trial_directory(number) / "best"
            if run is None:
                # An earlier part of the sweep ran it, and may have marked it.
                if number == best or mark.exists():
                    with self._open_run(number, trial.drawn, trial.overrides) as run:
                        run.set_tags({"best": str(number == best).lower()})
            elif number == best:
                run.set_tags({"best": "true"})
            if number == best:
                mark.touch()
            elif mark.exists():
                self._files.removed(mark)
                mark.unlink()

    def _open_run(
        self, number: int, drawn: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> TrackedRun:
        return self._tracker.stage(
            trial_name(number),
            self._trial_directory(number),
            params=dict(drawn) or {"point": "the recipe as it stands"},
            fingerprint=_fingerprint(number, overrides),
        )

    def _trial_directory(self, number: int) -> Path:
        return self._directory / TRIALS_DIRECTORY / trial_name(number)

    def _is_spent(self) -> bool:
        budget = self._config.search.worker_budget_s
        if budget is None:
            return False
        spent = sum(trial.seconds * self._workers(trial) for trial in self._log.trials.values())
        if spent >= budget:
            self._console.note(
                f"search.worker_budget_s={budget:g} is spent ({spent:.0f} s); no more trials"
            )
        return spent >= budget

    def _workers(self, trial: Trial) -> int:
        known = self._workers_of
        if trial.number not in known:
            raw = point_settings(self._config, trial.overrides)
            known[trial.number] = RunConfig.model_validate(raw).parallel.max_workers
        return known[trial.number]

    def _show(self) -> None:
        """Show the trials that are over, the best of them, and where the others are."""
        trials, best = self._log.trials, self._log_best()
        self._console.trials(
            sum(trial.status != "running" for trial in trials.values()),
            self._num_trials,
            {} if best is None else {f"best {self._metric}": best},
            {
                f"{trial_name(number)} rung {len(trial.reports)}/{self._num_rungs}": trial.value(
                    self._metric
                )
                for number, trial in trials.items()
                if trial.status == "running" and trial.reports
            },
        )

    def _log_best(self) -> float | None:
        best: float | None = None
        for trial in self._log.trials.values():
            value = trial.value(self._metric)
            if trial.status == "finished" and (best is None or is_better(self._mode, value, best)):
                best = value
        return best

    def _best_words(self) -> str:
        best = self._log_best()
        return "" if best is None else f"  (best {best:.4g})"


def point_tags(config: RunConfig, overrides: Mapping[str, Any]) -> dict[str, str]:
    """Give what people filter trials by."""
    settings = point_settings(config, overrides)
    return {path.rpartition(".")[2]: str(_at(settings, path)) for path in TAGGED}


def _fingerprint(number: int, overrides: Mapping[str, Any]) -> str:
    return value_digest([number, dict(overrides)])


def _at(settings: Mapping[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value[key]
    return value


def _said(drawn: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{path.rpartition('.')[2]} {f'{value:.3g}' if isinstance(value, float) else value}"
        for path, value in drawn.items()
    )
