"""What a kind of task is to the rest of the library.

Shapes: B or N samples, C outputs of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class TaskKind(Protocol):
    """One kind of task; whoever trains, scores, measures or serves asks it and no label's type."""

    @property
    def name(self) -> str:
        """As recipes say it."""

    @property
    def has_classes(self) -> bool:
        """Whether labels are ids of named classes, and not numbers."""

    @property
    def label_type(self) -> str:
        """The type of the label column."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that suit it."""

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """What it is measured by where a recipe says nothing, the main one first."""

    @property
    def unit(self) -> str:
        """What an interval resamples."""

    @property
    def prediction_term(self) -> str:
        """The name of its distance from the teacher's predictions among the loss terms."""

    def owns(self, config: Any) -> bool:
        """Whether a transformers configuration is that of a model for this kind of task."""

    def num_outputs(self, label_names: Sequence[str] | None) -> int:
        """Outputs of a head."""

    def head_settings(self, label_names: Sequence[str] | None) -> dict[str, Any]:
        """What a transformers configuration says of such a head."""

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """The task's own loss of each sample, (B,) float32; training and importance share it."""

    def prediction_loss(
        self, student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Distance of the student's predictions from the teacher's, summed over samples."""

    def soft_target_loss(
        self, student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Distance from the teacher's softened predictions, summed over samples."""

    def prediction_errors(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """The same distance of each sample, at temperature 1; (B,) float32."""

    def answers(self, logits_NC: Tensor) -> Tensor:
        """What metrics compare with labels, (N,)."""

    def bounded(self, logits_BC: Tensor) -> Tensor:
        """The prediction in a fixed range, as a discriminator sees it; (B, C) float32."""
