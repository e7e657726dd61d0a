"""One number for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_dist.losses.distillation import prediction_mse


class Regression:
    """Labels are numbers; see `TaskKind`."""

    name = "regression"
    has_classes = False
    label_type = "float64"
    metrics = ("pearson", "spearman")
    default_metrics = metrics
    unit = "sample"
    prediction_term = "prediction_mse"

    def owns(self, config: Any) -> bool:
        """As transformers decides it: it is said, or there is one output."""
        return config.problem_type == "regression" or config.num_labels == 1

    def num_outputs(self, label_names: Sequence[str] | None) -> int:
        """A single output."""
        return 1

    def head_settings(self, label_names: Sequence[str] | None) -> dict[str, Any]:
        """A single output, under the name that transformers gives it."""
        return {
            "problem_type": "regression",
            "id2label": {0: "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Squared error, (B,); the logits may be (B, 1) or (B,)."""
        return (logits_BC.float().reshape(labels_B.shape) - labels_B.float()).square()

    def prediction_loss(
        self, student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Squared difference; a number has no temperature."""
        return prediction_mse(student_BC, teacher_BC)

    def soft_target_loss(
        self, student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Squared difference; a number has no temperature."""
        return prediction_mse(student_BC, teacher_BC)

    def prediction_errors(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Squared difference of each sample, (B,)."""
        return (student_BC.float() - teacher_BC.float()).square().flatten(1).sum(dim=1)

    def answers(self, logits_NC: Tensor) -> Tensor:
        """The output itself, (N,)."""
        return logits_NC[:, 0]

    def bounded(self, logits_BC: Tensor) -> Tensor:
        """The output, squashed, (B, 1)."""
        return torch.tanh(logits_BC.float())
