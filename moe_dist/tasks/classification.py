"""One class of several for each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moe_dist.losses.distillation import prediction_kl, soft_targets
from moe_dist.tasks.forward_kind import ForwardKind
from moe_dist.tasks.kind import LabelKind


class Classification(ForwardKind):
    """Labels are ids of named classes."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    label: ClassVar[LabelKind] = "class"
    metrics = ("accuracy", "f1", "matthews")
    default_metrics = ("accuracy",)
    prediction_term = "prediction_kl"
    distance = "symmetric KL divergence of the classes' probabilities"
    joins_tasks = True
    answers_once = True
    served_columns: ClassVar[Mapping[str, str]] = {
        "label": "text",
        "score": "number",
        "scores": "named numbers",
    }

    def owns(self, architecture: str, config: Any) -> bool:
        """Every classifier that is no regressor, as transformers decides it."""
        is_regressor = config.problem_type == "regression" or config.num_labels == 1
        return architecture.endswith("ForSequenceClassification") and not is_regressor

    def num_outputs(self, label_names: Sequence[str] | None) -> int:
        """One output for each class."""
        assert label_names is not None, "label names are resolved when the data is loaded"
        return len(label_names)

    def own_head(self, classifier: str) -> str:
        """The classifier's last layer."""
        return classifier

    def model_settings(
        self, label_names: Sequence[str] | None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Classes by their ids."""
        names = list(map(str, label_names or ()))
        return {
            "num_labels": len(names),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }

    def losses(self, predictions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy of the labels, (B,)."""
        labels_B = batch["labels"].long()
        return functional.cross_entropy(predictions.float(), labels_B, reduction="none")

    def prediction_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Symmetric Kullback-Leibler divergence; see `prediction_kl`."""
        return prediction_kl(student, teacher, temperature)

    def prediction_errors(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Symmetric Kullback-Leibler divergence of each sample, (B,)."""
        return torch.func.vmap(lambda own, other: prediction_kl(own, other, temperature))(
            student, teacher
        )

    def soft_target_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """See `soft_targets`."""
        return soft_targets(student, teacher, temperature)

    def bounded(self, predictions: Tensor) -> Tensor:
        """Probabilities, (B, C)."""
        return torch.softmax(predictions.float(), dim=-1)

    def said(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """The likeliest class, (N,)."""
        return values.argmax(axis=-1)

    def served(self, answers: Tensor, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """The likeliest class, its probability, and those of all classes, which add up to 1."""
        rows = []
        for scores in answers.softmax(dim=-1).tolist():
            named = dict(zip(label_names, scores, strict=True))
            label = max(named, key=lambda name: named[name])
            rows.append({"label": label, "score": named[label], "scores": named})
        return rows
