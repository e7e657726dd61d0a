"""Learning rate over the optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["linear", "constant"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up, then linear decay to zero or a constant.

    Args:
        kind: "linear" decays to zero at num_steps, "constant" does not decay.
        num_steps: optimizer steps of the whole run.
        warmup_steps: how many of them warm up; the first has 1/warmup_steps of the full rate.
    """

    kind: ScheduleKind
    num_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "constant"):
            raise ValueError(f"lr_schedule={self.kind!r} is not one of linear, constant")

    def factor(self, step: int) -> float:
        """Return the share, 0 to 1, of the full rate after so many optimizer steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        remaining = self.num_steps - step
        return max(0.0, remaining / max(1, self.num_steps - self.warmup_steps))
