"""Population based training on Ray Tune: the whole population at one rung, then its changes.

Tune's scheduler decides who takes over whose weights. What it does not know is left to the caller:
which values the weak trial goes on with (`Population.breed`). The weights themselves are the step
checkpoints of the trials; Tune carries no more than their paths.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.search.driver_only import DriverOnly

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import SearchAlgorithm

QUANTILE = 0.25
"""So many of the trials are replaced at each rung, by as many of the best."""


@dataclass(frozen=True)
class Population:
    """What a population needs beside its tasks.

    Args:
        breed: given a weak trial's number, that of the strong one whose weights it takes over and
            the step that these are at, gives the weak trial's new task.
        directory: seen by all nodes; Tune keeps paths of checkpoints below it while it runs.
        seed: of the choice among the strong.
    """

    breed: Callable[[int, int, int], Mapping[str, Any]]
    directory: Path
    seed: int


def all_at_once() -> SearchAlgorithm:
    """Propose the tasks of a parameter space that lists them.

    Tune's own generator, but not over before its trials are: Tune keeps no worker warm for trials
    that wait if nothing new can come.
    """
    from ray.tune.search import BasicVariantGenerator

    class Whole(BasicVariantGenerator):
        def __init__(self) -> None:
            super().__init__()
            self._made: list[Any] = []

        def next_trial(self) -> Any:
            trial = super().next_trial()
            self._made += [] if trial is None else [trial]
            return trial

        def is_finished(self) -> bool:
            return super().is_finished() and all(trial.is_finished() for trial in self._made)

    return Whole()


def in_step(population: Population, **compared: Any) -> TrialScheduler:
    """Build Tune's population based training in its synchronous form.

    Trials are compared at the same rung only, so that what comes out does not hang on who was
    faster. Three things are changed. New values are bred by the caller, since Tune's own go beyond
    the ends of a range. The choice among the strong is drawn from the seed. And a trial that fails,
    or one that is not ruled, is not waited for: Tune's scheduler would wait for ever.

    Args:
        population: the caller's side.
        **compared: `time_attr`, `metric` and `mode`.

    Returns:
        The scheduler.
    """
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import PopulationBasedTraining

    # Not the population itself: the class is pickled with what it refers to.
    breed, seed = DriverOnly(population.breed), population.seed

    class InStep(PopulationBasedTraining):
        def __init__(self) -> None:
            super().__init__(
                synch=True,
                perturbation_interval=1,
                quantile_fraction=QUANTILE,
                custom_explore_fn=dict,
                log_config=False,
                require_attrs=False,
                **compared,
            )
            self._chance = random.Random(seed)

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
            self._members()
            return super().on_trial_result(controller, trial, result)

        def choose_trial_to_run(self, controller: Any) -> Any:
            waiting = self._members()
            if waiting and all(
                trial.status == Trial.PAUSED
                and self._trial_state[trial].last_train_time >= self._next_perturbation_sync
                for trial in waiting
            ):
                # The trial that they waited for has failed.
                self.on_trial_result(
                    controller, waiting[0], self._trial_state[waiting[0]].last_result
                )
            return super().choose_trial_to_run(controller)

        def _members(self) -> list[Any]:
            """List the trials that are compared, and see that no other holds them up."""
            members = []
            for trial, state in self._trial_state.items():
                if not trial.is_finished() and _task(trial).get("is_ruled", True):
                    members.append(trial)
                else:
                    state.last_train_time = self._next_perturbation_sync
            return members

        def _checkpoint_or_exploit(
            self, trial: Any, controller: Any, upper: list[Any], lower: list[Any]
        ) -> None:
            if trial in lower:
                upper = [self._chance.choice(upper)]
            super()._checkpoint_or_exploit(trial, controller, upper, lower)

        def _get_new_config(self, trial: Any, strong: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            last = json.loads(self._trial_state[strong].last_result["report"])
            numbers = _task(trial)["number"], _task(strong)["number"]
            return {"task": json.dumps(breed()(*numbers, last["step"]))}, {}

    return InStep()


def _task(trial: Any) -> dict[str, Any]:
    task: dict[str, Any] = json.loads(trial.config["task"])
    return task
