"""Ray's Torch trainer without the processes that serve Ray Data."""

from __future__ import annotations

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback


class LeanTorchTrainer(TorchTrainer):
    """A `TorchTrainer` whose job reads its data itself.

    Ray 2.60 starts a process beside each group of workers that would hand out Ray Data sets, even
    where there are none; importing what it needs takes seconds of a core just when the workers
    import what they need.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]
