"""Runs the trials of a search on Ray Tune.

A trial is a function of a plain task, handed in from outside, that reports as it goes. Trials of
one worker run in place: in an actor that holds their CPUs, keeps what it has loaded, and takes the
next trial when one ends. Trials of several workers start them with the normal driver, from an actor
that holds no CPU. Who proposes tasks and who keeps the results is the caller's affair too, so that
a sweep continues from its own records and not from a pickle of Ray's.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moe_dist.errors import MoeDistError
from moe_dist.search.driver_only import DriverOnly
from moe_dist.search.early_stopping import (
    OBJECTIVE,
    TIME,
    Ruling,
    build_scheduler,
    compared_by,
    ruled_value,
)
from moe_dist.search.population import Population, all_at_once, in_step
from moe_dist.search.trials import Report, Trial
from moe_dist.workers.cluster_capacity import Capacity, describe_nodes
from moe_dist.workers.job_errors import first_line, user_error
from moe_dist.workers.placement import NumWorkers, Placement, choose_placement
from moe_dist.workers.ray_session import RaySession

if TYPE_CHECKING:
    from ray.tune import Callback
    from ray.tune.search import Searcher

Task = Mapping[str, Any]
"""What a trial is told: plain values, with its ``number``, and ``resume``, a checkpoint, if any."""
Say = Callable[[Mapping[str, Any]], None]
RunTrial = Callable[[Task, Say], None]
"""Runs a trial, and says ``rung``, ``step``, ``num_steps`` and ``metrics`` as it goes.

In a population also ``checkpoint``, the directory of what it has reached, but for the last rung.
"""
FAILURE = "failure"
POINTER_NAME = "pointer.json"
LEAVING_S = 120
"""How long a trial that Tune takes off its actor may take to leave; Tune's own is 2 s."""
_DRIVER_SHARE = 0.001
_HEAD = "node:__internal_head__"
logger = logging.getLogger("moe_dist.training")


class Watcher(Protocol):
    """Who proposes trials and keeps what becomes of them; called in the driver, one at a time."""

    def next_task(self) -> Task | None:
        """Give the next trial's task; None if there are no more."""

    def started(self, number: int) -> None:
        """Take note that a trial runs now."""

    def reported(self, number: int, report: Report, num_steps: int, seconds: float) -> None:
        """Take note of what it measured."""

    def ended(self, number: int, message: str = "") -> None:
        """Take note that it is over; with a message, that it failed."""

    def is_time_up(self) -> bool:
        """Tell whether the sweep is to end now, its running trials left unfinished."""


@dataclass(frozen=True)
class TrialRoom:
    """Where trials run.

    Args:
        placement: the workers of one trial.
        num_concurrent: trials at a time.
        in_place: a trial is one worker, which is the trial's own actor.
    """

    placement: Placement
    num_concurrent: int
    in_place: bool

    def __str__(self) -> str:
        """Say the arithmetic."""
        workers, need = self.placement.least, self.placement.need
        trials = f"{self.num_concurrent} trial{'s' if self.num_concurrent > 1 else ''} at a time"
        return f"{trials}, each of {workers} worker{'s' if workers > 1 else ''} with {need}"


def find_room(
    capacity: Capacity,
    num_workers: NumWorkers,
    cpus_per_worker: int,
    use_gpu: bool | None,
    most: int | None = None,
) -> TrialRoom:
    """Work out how many trials, `most` at the most, fit into a cluster at once.

    The pair of `num_workers` is the least and the most for one trial; with a `use_gpu` of None GPUs
    are taken where there are enough. ClusterError, with the arithmetic, if not one trial fits.
    """
    placement = choose_placement(capacity, num_workers, cpus_per_worker, use_gpu)
    # What an autoscaler may add is not counted: a sweep that waits for it would wait as a whole.
    most_at_once = max(1, capacity.present_slots(placement.need) // placement.least)
    logger.debug("trials on %s", describe_nodes(capacity))
    return TrialRoom(
        placement,
        most_at_once if most is None else min(most_at_once, most),
        in_place=placement.most == 1,
    )


def run_sweep(
    run_trial: RunTrial,
    watcher: Watcher,
    ruling: Ruling,
    room: TrialRoom,
    session: RaySession,
    *,
    num_trials: int,
    past: Iterable[Trial] = (),
    population: Population | None = None,
) -> None:
    """Run trials until the watcher has no more, or the time is up.

    Args:
        run_trial: runs one; it is sent to the workers, and kept there from trial to trial.
        watcher: proposes and records.
        ruling: who ends trials early.
        room: where they run.
        session: the connection to Ray.
        num_trials: how many there are at most.
        past: trials of an interrupted sweep that are over; early stopping goes by them too.
        population: for `pbt`, which takes all tasks of the watcher at once.

    Raises:
        MoeDistError: if Ray Tune itself fails.
    """
    session.connect()
    for variable, value in _TUNE_VARIABLES.items():
        os.environ.setdefault(variable, value)
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    bundle = room.placement.resources if room.in_place else {_HEAD: _DRIVER_SHARE}
    # Tune's own records are of no use: the watcher keeps what counts.
    here = DriverOnly(watcher)
    space: dict[str, Any] = {}
    if population is None:
        chosen = {"search_alg": _searcher(here), "scheduler": build_scheduler(ruling, past)}
        chosen |= {"num_samples": num_trials, "max_concurrent_trials": room.num_concurrent}
    else:
        space = {"task": tune.grid_search(_all_tasks(watcher))}
        chosen = {"search_alg": all_at_once()}
        chosen |= {"scheduler": in_step(population, **compared_by(ruling))}
    directory = None if population is None else population.directory
    with tempfile.TemporaryDirectory(
        prefix="moe-dist-tune-", dir=directory, ignore_cleanup_errors=True
    ) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(
                _trainable(run_trial, ruling), tune.PlacementGroupFactory([bundle])
            ),
            param_space=space,
            tune_config=tune.TuneConfig(
                reuse_actors=room.in_place,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                **chosen,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                callbacks=[_callback(here)],
                stop=_stopper(here),
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError as fault:
            raise MoeDistError(
                f"Ray Tune failed: {first_line(fault)}",
                remedy="the same command continues the sweep; finished trials are kept."
                if population is None
                else "start the population anew, with another `name`.",
            ) from fault


_TUNE_VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def _all_tasks(watcher: Watcher) -> list[str]:
    return [json.dumps(task) for task in iter(watcher.next_task, None)]


def _trainable(run_trial: RunTrial, ruling: Ruling) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        # Else an actor whose last trial took its time to end, on a busy node, fails the next one.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(LEAVING_S)
        task = json.loads(config["task"])
        begin = time.monotonic()
        held = tune.get_checkpoint()
        if held is not None:
            with held.as_directory() as path:
                pointer = json.loads((Path(path) / POINTER_NAME).read_text(encoding="utf-8"))
            task["resume"] = pointer["checkpoint"]
            begin -= pointer["seconds"]
        last: dict[str, Any] = {}

        def say(report: Mapping[str, Any]) -> None:
            last.update(report, seconds=time.monotonic() - begin)
            checkpoint = last.pop("checkpoint", None)
            result: dict[str, Any] = {"report": json.dumps(last)}
            # A population is not changed at the end, where nothing is left to train.
            is_late = ruling.scheduler == "pbt" and last["rung"] >= ruling.last_rung
            if task.get("is_ruled", True) and not is_late:
                result |= {TIME: last["rung"], OBJECTIVE: ruled_value(last["metrics"], ruling)}
            if checkpoint is None:
                tune.report(result)
                return
            # Tune copies what it is given; what counts stays where all nodes see it.
            with tempfile.TemporaryDirectory() as path:
                pointer = {"checkpoint": checkpoint, "seconds": last["seconds"]}
                (Path(path) / POINTER_NAME).write_text(json.dumps(pointer), encoding="utf-8")
                tune.report(result, checkpoint=tune.Checkpoint.from_directory(path))

        try:
            run_trial(task, say)
        except Exception as fault:  # The others go on; this one says what happened.
            error = user_error(fault) or fault
            said = error.message if isinstance(error, MoeDistError) else ""
            text = said or f"{type(fault).__name__}: {first_line(fault)}"
            logger.warning("trial %s failed", task["number"], exc_info=True)
            tune.report({FAILURE: text, "seconds": time.monotonic() - begin})

    return trial


def _searcher(here: DriverOnly[Watcher]) -> Searcher:
    from ray.tune.search import Searcher

    class Proposed(Searcher):
        def suggest(self, trial_id: str) -> Any:
            task = here().next_task()
            return Searcher.FINISHED if task is None else {"task": json.dumps(task)}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

    return Proposed(metric=OBJECTIVE, mode="max")


def _callback(here: DriverOnly[Watcher]) -> Callback:
    from ray.tune import Callback

    numbers: dict[str, int] = {}
    failed: set[int] = set()

    class Noted(Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            number = int(json.loads(trial.config["task"])["number"])
            if trial.trial_id not in numbers:
                numbers[trial.trial_id] = number
                here().started(number)

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **_: Any
        ) -> None:
            number = numbers[trial.trial_id]
            if FAILURE in result:
                failed.add(number)
                here().ended(number, str(result[FAILURE]))
            elif "report" in result:
                report = json.loads(result["report"])
                here().reported(
                    number,
                    Report(report["rung"], report["step"], dict(report["metrics"])),
                    report["num_steps"],
                    report["seconds"],
                )

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            number = numbers[trial.trial_id]
            if number not in failed:
                here().ended(number)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            number = numbers.get(trial.trial_id)
            if number is not None and number not in failed:
                failed.add(number)
                here().ended(number, f"its worker ended: {_last_line(trial)}")

    return Noted()


def _last_line(trial: Any) -> str:
    error = trial.get_pickled_error() if hasattr(trial, "get_pickled_error") else None
    return first_line(error) if isinstance(error, BaseException) else "no reason was given"


def _stopper(here: DriverOnly[Watcher]) -> Any:
    from ray.tune import Stopper

    class TimeUp(Stopper):
        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return here().is_time_up()

    return TimeUp()
