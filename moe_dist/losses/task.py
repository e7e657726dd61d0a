"""The task's own loss, summed over samples.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def classification_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross entropy of the labels.

    Args:
        logits_BC: scores before softmax.
        labels_B: int64 class ids.

    Returns:
        Scalar, summed over samples.
    """
    return functional.cross_entropy(logits_BC.float(), labels_B.long(), reduction="sum")


def regression_loss(logits_B1: Tensor, labels_B: Tensor) -> Tensor:
    """Squared error of a single output.

    Args:
        logits_B1: (B, 1) or (B,) predictions.
        labels_B: (B,) targets.

    Returns:
        Scalar, summed over samples.
    """
    predictions_B = logits_B1.float().reshape(labels_B.shape)
    return functional.mse_loss(predictions_B, labels_B.float(), reduction="sum")
