"""One class of several for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.losses.distillation import prediction_kl, soft_targets


class Classification:
    """Labels are ids of named classes; see `TaskKind`."""

    name = "classification"
    has_classes = True
    label_type = "int64"
    metrics = ("accuracy", "f1", "matthews")
    default_metrics = ("accuracy",)
    unit = "sample"
    prediction_term = "prediction_kl"

    def owns(self, config: Any) -> bool:
        """Every classifier that is no regressor, as transformers decides it."""
        return config.problem_type != "regression" and config.num_labels > 1

    def num_outputs(self, label_names: Sequence[str] | None) -> int:
        """One output for each class."""
        assert label_names is not None, "label names are resolved when the data is loaded"
        return len(label_names)

    def head_settings(self, label_names: Sequence[str] | None) -> dict[str, Any]:
        """Classes by their ids."""
        names = list(map(str, label_names or ()))
        return {
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Cross entropy of the labels, (B,)."""
        return functional.cross_entropy(logits_BC.float(), labels_B.long(), reduction="none")

    def prediction_loss(
        self, student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Symmetric Kullback-Leibler divergence; see `prediction_kl`."""
        return prediction_kl(student_BC, teacher_BC, temperature)

    def soft_target_loss(
        self, student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """See `soft_targets`."""
        return soft_targets(student_BC, teacher_BC, temperature)

    def prediction_errors(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Symmetric Kullback-Leibler divergence of each sample, (B,)."""
        return torch.func.vmap(prediction_kl)(student_BC, teacher_BC)

    def answers(self, logits_NC: Tensor) -> Tensor:
        """The likeliest class, (N,)."""
        return logits_NC.argmax(dim=-1)

    def bounded(self, logits_BC: Tensor) -> Tensor:
        """Probabilities, (B, C)."""
        return torch.softmax(logits_BC.float(), dim=-1)
