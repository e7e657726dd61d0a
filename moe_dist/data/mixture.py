"""Several tasks in one run: their rows, how often each is drawn, and their joined batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_dist.data.loaders import StepBatch, TrainBatches
from moe_dist.data.sources import Splits, load_splits
from moe_dist.errors import DataError

MEAN = "mean"
"""Name of the mean over all tasks of their main metrics."""
DEFAULT_TEMPERATURE = 2.0
# Beside the run's seed, so that the order of tasks is another draw than that of samples.
_DRAW = 7


@dataclass(frozen=True)
class Mixture:
    """The rows of several tasks that one model learns.

    Attributes:
        parts: each task's rows by its name, in the order of the tasks' numbers.
        shares: how often each task is drawn; they add up to 1.
    """

    parts: Mapping[str, Splits]
    shares: tuple[float, ...]

    @property
    def main_metric(self) -> str:
        """The metric that retention and comparisons are about."""
        return MEAN

    @property
    def higher_is_better(self) -> bool:
        """Which way the mean is better: that of every task."""
        return next(iter(self.parts.values())).higher_is_better

    @property
    def metric_titles(self) -> dict[str, str]:
        """What people call each metric, by its name."""
        return {MEAN: MEAN} | {
            f"{task}/{name}": f"{task}/{title}"
            for task, splits in self.parts.items()
            for name, title in splits.metric_titles.items()
        }

    @property
    def num_labels(self) -> int:
        """Outputs of all heads together."""
        return sum(splits.num_labels for splits in self.parts.values())

    @property
    def digest(self) -> str:
        """SHA-256 over names, tasks and rows."""
        return _digest([[name, splits.digest] for name, splits in self.parts.items()])

    @property
    def train_digest(self) -> str:
        """SHA-256 over what training sees: names, training rows and shares."""
        parts = [[name, splits.train_digest] for name, splits in self.parts.items()]
        return _digest([parts, self.shares])

    @property
    def distill_digest(self) -> str:
        """SHA-256 over what a distillation sees, rows without labels included."""
        parts = [[name, splits.distill_digest] for name, splits in self.parts.items()]
        return _digest([parts, self.shares])

    @property
    def source(self) -> str:
        """Where the rows came from, in words."""
        return "; ".join(f"{name}: {splits.source}" for name, splits in self.parts.items())

    @property
    def num_near_copies(self) -> int:
        """Training rows that were left out as near copies of held-out dev rows."""
        return sum(splits.num_near_copies for splits in self.parts.values())


Rows = Splits | Mixture


def load_rows(arguments: Mapping[str, Any]) -> Rows:
    """Load the rows of a run: those of one task, or of several.

    Args:
        arguments: the keyword arguments of `load_splits`; or `tasks` (those of each task by its
            name), `mixing` and `mixing_temperature` as in `mixing_shares`, and `seed`.

    Returns:
        Checked rows.

    Raises:
        DataError: for whatever is wrong with the data, of all tasks at once.
    """
    if "tasks" not in arguments:
        return load_splits(**arguments)
    parts: dict[str, Splits] = {}
    faults: list[DataError] = []
    for name, own in arguments["tasks"].items():
        try:
            parts[name] = load_splits(**own, seed=arguments["seed"])
        except DataError as error:
            faults.append(DataError(f"task {name}: {error.message}", remedy=error.remedy))
    if faults:
        if len(faults) == 1:
            raise faults[0]
        remedies = list(dict.fromkeys(fault.remedy for fault in faults if fault.remedy))
        message = "; ".join(fault.message for fault in faults)
        raise DataError(message, remedy="; ".join(remedies)) from faults[0]
    _check_one_direction(parts)
    shares = mixing_shares(
        [len(splits.train) for splits in parts.values()],
        arguments.get("mixing"),
        arguments.get("mixing_temperature"),
    )
    return Mixture(parts, shares)


def _check_one_direction(parts: Mapping[str, Splits]) -> None:
    """Refuse main metrics of which some are better high and others low: no mean says anything."""
    if len({splits.higher_is_better for splits in parts.values()}) > 1:
        said = ", ".join(
            f"{splits.main_metric} of {name} the {'higher' if splits.higher_is_better else 'lower'}"
            for name, splits in parts.items()
        )
        raise DataError(
            f"the tasks' main metrics have no mean, since not all are better the same way: {said}",
            remedy="name metrics of one direction first in data.tasks.NAME.metrics",
        )


def mixing_shares(
    num_rows: Sequence[int], mixing: str | None = None, temperature: float | None = None
) -> tuple[float, ...]:
    """Say how often each task is drawn.

    Args:
        num_rows: training rows of each task.
        mixing: ``size`` (also None): in proportion to the rows; ``temperature``: to the rows to
            the power of 1 / temperature.
        temperature: at least 1; None is `DEFAULT_TEMPERATURE`.

    Returns:
        Shares that add up to 1.
    """
    power = 1.0 / (temperature or DEFAULT_TEMPERATURE) if mixing == "temperature" else 1.0
    weights = [count**power for count in num_rows]
    return tuple(weight / sum(weights) for weight in weights)


def joined_metrics(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Join the tasks' metrics: `MEAN` of the main ones and `TASK/METRIC`.

    `by_task` has the main metric of each task first; the metrics of a single task, under the name
    "", stay as they are.
    """
    if set(by_task) == {""}:
        return dict(by_task[""])
    mains = [next(iter(metrics.values())) for metrics in by_task.values()]
    joined = {MEAN: sum(mains) / len(mains)}
    for task, metrics in by_task.items():
        joined |= {f"{task}/{name}": value for name, value in metrics.items()}
    return joined


class MixtureBatches:
    """Training batches of several tasks, each step of one task.

    An epoch has as many steps as all rows fill. Which task a step is of depends on shares, seed
    and epoch only, and within an epoch no task's steps differ by more than one from its share; so
    the batches are the same at every world size. A task's own batches follow one another as they
    would alone, whatever the epochs of the mixture.

    Args:
        parts: each task's batches, by its name.
        shares: how often each task is drawn.
        seed: of the draw.
    """

    def __init__(
        self, parts: Mapping[str, TrainBatches], shares: Sequence[float], *, seed: int
    ) -> None:
        assert len(parts) == len(shares)
        self._parts = dict(parts)
        self._shares = shares
        self._seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        parts = self._parts.values()
        return mixture_steps([len(part.encoded) for part in parts], next(iter(parts)).batch_size)

    def tasks_of(self, epoch: int) -> NDArray[np.int64]:
        """Draw the number of the task of each step, (steps_per_epoch,)."""
        rng = np.random.default_rng([self._seed, epoch, _DRAW])
        steps = self.steps_per_epoch
        # Evenly spaced points with one random offset: less noise than a draw for each step.
        points = (rng.random() + np.arange(steps)) / steps
        tasks = np.searchsorted(np.cumsum(self._shares), points, side="right")
        order: NDArray[np.int64] = rng.permutation(np.minimum(tasks, len(self._shares) - 1))
        return order

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """The steps left of one epoch, each with its task."""
        plan = self.tasks_of(epoch)
        before = np.concatenate([*map(self.tasks_of, range(epoch)), plan[:start_step]])
        streams = [
            _stream(batches, int(np.sum(before == task)))
            for task, batches in enumerate(self._parts.values())
        ]
        names = list(self._parts)
        for task in plan[start_step:].tolist():
            yield replace(next(streams[task]), task=task, task_name=names[task])


def even_share(limit: int, num_tasks: int) -> int:
    """Share a number of rows out evenly among tasks, rounded up."""
    return -(-limit // num_tasks)


def mixture_steps(num_rows: Sequence[int], batch_size: int) -> int:
    """Count the optimizer steps in one epoch of several tasks, at least 1."""
    return max(1, sum(num_rows) // batch_size)


def _stream(batches: TrainBatches, num_taken: int) -> Iterator[StepBatch]:
    """A task's batches from any place on, epoch after epoch."""
    epoch, step = divmod(num_taken, batches.steps_per_epoch)
    while True:
        yield from batches.epoch(epoch, step)
        epoch, step = epoch + 1, 0


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
