"""Who proposes the next point of a space: chance, a grid, or Optuna's TPE."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

from moe_dist.config import RunConfig
from moe_dist.config.search_section import MeasureMode
from moe_dist.config.search_space import (
    Dimension,
    Point,
    grid_points,
    random_draw,
    sample_point,
)
from moe_dist.search.trials import BASELINE, Trial

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


IsTrainable = Callable[[Point], bool]
MAX_DRAWS = 500
MAX_ASKED = 50


class Proposer(Protocol):
    """Proposes points and learns from what became of them."""

    def propose(self, number: int) -> Point | None:
        """Give the point of a trial; None if there are no more."""

    def tell(self, trial: Trial) -> None:
        """Learn from a trial that is over."""


class _SpaceProposer:
    """Proposes points of a space, and learns nothing.

    Args:
        dimensions: of the space.
        config: the recipe.
        is_trainable: tells whether a point can be trained and was not yet.
    """

    def __init__(
        self, dimensions: tuple[Dimension, ...], config: RunConfig, is_trainable: IsTrainable = bool
    ) -> None:
        self._dimensions, self._config, self._is_trainable = dimensions, config, is_trainable

    def tell(self, trial: Trial) -> None:
        """Learn nothing."""


class RandomProposer(_SpaceProposer):
    """Draws each trial's point from the seed and its number."""

    def propose(self, number: int) -> Point | None:
        """Draw until a point passes."""
        draw = random_draw(random.Random(f"{self._config.seed}-{number}"))
        points = (sample_point(self._dimensions, self._config, draw) for _ in range(MAX_DRAWS))
        return next((point for point in points if self._is_trainable(point)), None)


class GridProposer(_SpaceProposer):
    """Goes through every point of a finite space that passes."""

    @cached_property
    def _points(self) -> Iterator[Point]:
        return filter(self._is_trainable, grid_points(self._dimensions, self._config))

    def propose(self, number: int) -> Point | None:
        """Give the next point."""
        return next(self._points, None)


class TpeProposer(RandomProposer):
    """Optuna's tree-structured Parzen estimator; its multi-objective form for several objectives.

    A study lives in memory: what an interrupted sweep found is told to it again.

    Args:
        dimensions: of the space.
        config: the recipe.
        is_trainable: tells whether a point can be trained and was not yet.
    """

    def __init__(
        self, dimensions: tuple[Dimension, ...], config: RunConfig, is_trainable: IsTrainable = bool
    ) -> None:
        super().__init__(dimensions, config, is_trainable)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._objectives = config.search.wanted
        sampler = optuna.samplers.TPESampler(
            seed=config.seed,
            # A quarter of the trials at random; Optuna's ten are half of a small sweep.
            n_startup_trials=max(4, min(10, config.search.num_trials // 4)),
            # Trials run beside each other: those under way count as bad ones nearby.
            constant_liar=True,
        )
        self._study: Study = optuna.create_study(
            directions=[_direction(mode) for mode in self._objectives.values()], sampler=sampler
        )
        self._asked: dict[int, Any] = {}

    def propose(self, number: int) -> Point | None:
        """Ask Optuna until a point passes, and chance if none does."""
        import optuna

        for _ in range(MAX_ASKED):
            asked = self._study.ask()
            point = sample_point(self._dimensions, self._config, partial(_suggest, asked))
            if self._is_trainable(point):
                self._asked[number] = asked
                return point
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return super().propose(number)

    def tell(self, trial: Trial) -> None:
        """Tell Optuna what a trial found; one without a value failed."""
        import optuna

        values = [trial.value(name) for name in self._objectives]
        is_known = not any(math.isnan(value) for value in values)
        asked = self._asked.pop(trial.number, None)
        if asked is not None:
            state = optuna.trial.TrialState.COMPLETE if is_known else optuna.trial.TrialState.FAIL
            self._study.tell(asked, values if is_known else None, state=state)
        elif is_known and trial.number != BASELINE:
            self._study.add_trial(_past_trial(self._dimensions, trial, values))


def build_proposer(
    dimensions: tuple[Dimension, ...],
    config: RunConfig,
    is_trainable: IsTrainable = bool,
    past: Iterable[Trial] = (),
) -> Proposer:
    """Choose who proposes, and tell it of the past trials of an interrupted sweep.

    `is_trainable` tells whether a point can be trained and was not yet.
    """
    proposer = PROPOSERS[config.search.chosen_algorithm](dimensions, config, is_trainable)
    for trial in past:
        proposer.tell(trial)
    return proposer


PROPOSERS: dict[str, Callable[[tuple[Dimension, ...], RunConfig, IsTrainable], Proposer]] = {
    "random": RandomProposer,
    "grid": GridProposer,
    "tpe": TpeProposer,
}


def _suggest(asked: Any, dimension: Dimension) -> Any:
    """Let Optuna draw one value."""
    path = dimension.path
    if dimension.kind == "choice":
        # By position, since Optuna takes plain scalars only.
        positions = tuple(range(len(dimension.values)))
        return dimension.values[asked.suggest_categorical(path, positions)]
    low, high = dimension.values
    if dimension.kind == "integers":
        return asked.suggest_int(path, low, high, log=dimension.log, step=dimension.step)
    return asked.suggest_float(path, low, high, log=dimension.kind == "loguniform")


def _direction(mode: MeasureMode) -> str:
    return "maximize" if mode == "max" else "minimize"


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if dimension.kind == "choice":
        return CategoricalDistribution(tuple(range(len(dimension.values))))
    low, high = dimension.values
    if dimension.kind == "integers":
        return IntDistribution(low, high, log=dimension.log, step=dimension.step)
    return FloatDistribution(low, high, log=dimension.kind == "loguniform")


def _past_trial(dimensions: tuple[Dimension, ...], trial: Trial, values: list[float]) -> Any:
    import optuna

    drawn = {
        dimension: trial.drawn[dimension.path]
        for dimension in dimensions
        if dimension.path in trial.drawn
    }
    params = {
        dimension.path: _position(dimension, value) if dimension.kind == "choice" else value
        for dimension, value in drawn.items()
    }
    return optuna.trial.create_trial(
        params=params,
        distributions={dimension.path: _distribution(dimension) for dimension in drawn},
        values=values,
    )


def _position(dimension: Dimension, value: Any) -> int:
    # What was a tuple came back from the log as a list.
    plain = tuple(value) if isinstance(value, list) else value
    return next(
        position
        for position, choice in enumerate(dimension.values)
        if choice == plain and isinstance(choice, bool) is isinstance(plain, bool)
    )
