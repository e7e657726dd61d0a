"""The task's losses."""

from __future__ import annotations

import math

import pytest
import torch

from moe_dist.losses.task import classification_loss, regression_loss


def test_classification_sums_cross_entropy() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    loss = classification_loss(logits, torch.tensor([0, 1]))
    assert float(loss) == pytest.approx(math.log(4 / 3) + math.log(2), rel=1e-6)


def test_regression_sums_squares_whatever_the_shape_of_the_head() -> None:
    labels = torch.tensor([1.0, 0.5])
    loss = regression_loss(torch.tensor([[0.0], [2.5]]), labels)
    assert float(loss) == pytest.approx(5.0)
    assert float(regression_loss(torch.tensor([0.0, 2.5]), labels)) == pytest.approx(5.0)


def test_losses_leave_low_precision() -> None:
    logits = torch.tensor([[1e4, -1e4]], dtype=torch.bfloat16)
    loss = classification_loss(logits, torch.tensor([1]))
    assert loss.dtype == torch.float32 and math.isfinite(float(loss))
