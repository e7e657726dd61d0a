"""Trials that are known beforehand: the seeds that confirm a sweep's best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.search.trials import BASELINE, LOG_NAME, Report, Status, TrialLog

from ..chain.fingerprints import value_digest
from .trial import trial_name
from .trial_stages import CONFIRMS_TAG, TrialStages, clear_stages
from .trial_watch import point_tags

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.search.trials import Trial
    from moe_dist.tracking import TrackedRun

    from ..chain.files import ResultFiles
    from ..console import Console


class Rerun:
    """A watcher of trials that are known beforehand; see `moe_dist.search.tune.Watcher`.

    Args:
        config: the sweep's recipe.
        directory: where the trials keep their files.
        tasks: what is to be run.
        best: the trial that they confirm.
        tracker: the sweep's run.
        console: what people see.
        files: the sweep's.
        tags: of every run.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        tasks: Sequence[Mapping[str, Any]],
        best: Trial,
        tracker: TrackedRun,
        console: Console,
        files: ResultFiles,
        tags: Mapping[str, str],
    ) -> None:
        self._config, self._directory, self._best = config, directory, best
        self._tracker, self._console = tracker, console
        self._files, self._tags = files, tags
        self.log = TrialLog(directory / LOG_NAME)
        done = {number for number, trial in self.log.trials.items() if trial.is_over}
        self._tasks = {task["number"]: task for task in tasks if task["number"] not in done}
        self._waiting = list(self._tasks)
        self._seconds: dict[int, float] = {}
        self._open: dict[int, tuple[TrackedRun, TrialStages]] = {}

    @property
    def num_left(self) -> int:
        """Trials that are still to be run."""
        return len(self._waiting)

    def next_task(self) -> Mapping[str, Any] | None:
        """Give the next trial."""
        if not self._waiting:
            return None
        number = self._waiting.pop(0)
        clear_stages(self._directory_of(number), self._files)
        return self._tasks[number]

    def started(self, number: int) -> None:
        """Note that a trial runs, and open its run."""
        task = self._tasks[number]
        seed, overrides = task["seed"], task["overrides"]
        self.log.started(number, {"seed": seed}, overrides)
        of = self._best.number if number % 2 == 0 else BASELINE
        fingerprint = value_digest([number, seed, overrides])
        run = self._tracker.stage(
            f"confirm-{'baseline' if of == BASELINE else trial_name(of)}-s{seed}",
            self._directory_of(number),
            params={"seed": seed, **overrides},
            fingerprint=fingerprint,
        ).__enter__()
        stages = TrialStages(run, self._directory_of(number), fingerprint, self._files)
        self._open[number] = run, stages
        own = {"seed": str(seed), "trial": str(of), CONFIRMS_TAG: trial_name(self._best.number)}
        run.set_tags({**self._tags, **point_tags(self._config, overrides), **own})

    def reported(self, number: int, report: Report, num_steps: int, seconds: float) -> None:
        """Note what it measured."""
        self._seconds[number] = seconds
        self.log.reported(number, report, num_steps)
        self._open[number][1].measured(report.step, report.metrics)

    def ended(self, number: int, message: str = "") -> None:
        """Note that it is over."""
        run, stages = self._open.pop(number)
        status: Status = "failed" if message else "finished"
        self.log.ended(number, status, self._seconds.get(number, 0.0), message)
        stages.end("FAILED" if message else "FINISHED")
        run.set_tags({"trial_status": status} | ({"failure": message[:500]} if message else {}))
        run.__exit__(RuntimeError if message else None, None, None)
        if message:
            self._console.warn(f"seed {self._tasks[number]['seed']} failed: {message}")

    def is_time_up(self) -> bool:
        """Go on to the end."""
        return False

    def close(self) -> None:
        """Close the runs of trials that were cut off; they go on with the same command."""
        for run, stages in self._open.values():
            with suppress(Exception):
                stages.end("KILLED")
                run.__exit__(KeyboardInterrupt, None, None)

    def _directory_of(self, number: int) -> Path:
        return self._directory / trial_name(number)
