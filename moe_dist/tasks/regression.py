"""One number for each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_dist.losses.distillation import prediction_mse
from moe_dist.tasks.forward_kind import ForwardKind
from moe_dist.tasks.kind import LabelKind


class Regression(ForwardKind):
    """Labels are numbers."""

    name = "regression"
    auto_class = "AutoModelForSequenceClassification"
    label: ClassVar[LabelKind] = "number"
    metrics = ("pearson", "spearman")
    default_metrics = metrics
    prediction_term = "prediction_mse"
    distance = "squared difference of the predictions"
    joins_tasks = True
    answers_once = True
    served_columns: ClassVar[Mapping[str, str]] = {"value": "number"}

    def owns(self, architecture: str, config: Any) -> bool:
        """As transformers decides it: it is said, or there is one output."""
        is_regressor = config.problem_type == "regression" or config.num_labels == 1
        return architecture.endswith("ForSequenceClassification") and is_regressor

    def num_outputs(self, label_names: Sequence[str] | None) -> int:
        """A single output."""
        return 1

    def own_head(self, classifier: str) -> str:
        """The classifier's last layer."""
        return classifier

    def model_settings(
        self, label_names: Sequence[str] | None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """A single output, under the name that transformers gives it."""
        return {
            "num_labels": 1,
            "problem_type": "regression",
            "id2label": {0: "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }

    def losses(self, predictions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Squared error, (B,); the predictions may be (B, 1) or (B,)."""
        labels_B = batch["labels"].float()
        return (predictions.float().reshape(labels_B.shape) - labels_B).square()

    def prediction_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Squared difference; a number has no temperature."""
        return prediction_mse(student, teacher)

    def prediction_errors(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Squared difference of each sample, (B,)."""
        return (student.float() - teacher.float()).square().flatten(1).sum(dim=1)

    def bounded(self, predictions: Tensor) -> Tensor:
        """The output, squashed, (B, 1)."""
        return torch.tanh(predictions.float())

    def served(self, answers: Tensor, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """The number."""
        return [{"value": value} for value in answers[:, 0].tolist()]
