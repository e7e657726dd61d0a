"""What the engines of one and of many processes hold alike."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from moe_dist.distributed.schedule import LearningRateSchedule
from moe_dist.distributed.update import Precision, current_rate, precision_context


class ScheduledEngine:
    """A model, its optimizer, and the rate of the next step.

    Args:
        model: on the device; in many processes its experts are cut to this rank's slice.
        optimizer: over the model's parameters, groups with `base_lr`.
        schedule: learning rate over steps.
        precision: "bf16" keeps weights in fp32 and computes under autocast.
        max_grad_norm: global norm to clip to; 0 for none.
        device: where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: LearningRateSchedule,
        precision: Precision,
        max_grad_norm: float,
        device: torch.device,
    ) -> None:
        self.module = model
        self.optimizer = optimizer
        self.device = device
        self.steps_done = 0
        self._schedule = schedule
        self._precision = precision
        self._max_grad_norm = max_grad_norm

    @property
    def learning_rate(self) -> float:
        """Rate of the next step, for parameters that are not routed experts."""
        return current_rate(self.optimizer, self._schedule.factor(self.steps_done))

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for the forward pass."""
        return precision_context(self._precision, self.device)
