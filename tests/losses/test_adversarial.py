"""The discriminator's functions against slow forms and torch's own, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moe_dist.losses.adversarial import (
    LEAK,
    DiscriminatorWeights,
    discriminator_features,
    discriminator_loss,
    discriminator_scores,
    fooling_loss,
    power_iteration,
    r1_penalty,
    spectral_norm,
)
from moe_dist.tasks import TASK_KINDS


def weights(num_features: int = 5) -> DiscriminatorWeights:
    torch.manual_seed(0)
    return DiscriminatorWeights(
        torch.randn(7, num_features), torch.randn(7), torch.randn(1, 7), torch.randn(1)
    )


def test_scores_are_those_of_a_two_layer_network() -> None:
    chosen, points = weights(), torch.randn(3, 5)
    network = nn.Sequential(nn.Linear(5, 7), nn.LeakyReLU(LEAK), nn.Linear(7, 1))
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), chosen.tensors(), strict=True):
            parameter.copy_(value)
    torch.testing.assert_close(discriminator_scores(points, chosen), network(points).squeeze(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = discriminator_scores(points, chosen)
    torch.testing.assert_close(found, discriminator_scores(points, chosen))


def test_losses_are_the_logarithms_they_stand_for() -> None:
    teacher, student = torch.randn(6), torch.randn(6)
    told = -teacher.sigmoid().log().sum() - (1 - student.sigmoid()).log().sum()
    torch.testing.assert_close(discriminator_loss(teacher, student), told)
    torch.testing.assert_close(fooling_loss(student), -student.sigmoid().log().sum())


def test_extreme_scores_have_finite_losses_and_gradients() -> None:
    scores = torch.tensor([1e5, -1e5], requires_grad=True)
    loss = discriminator_loss(scores, scores) + fooling_loss(scores)
    loss.backward()
    assert math.isfinite(loss.item())
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())
    logits = torch.tensor([[1e5, -1e5]], requires_grad=True)
    vectors = torch.tensor([[1e5, -1e5, 0.0]], requires_grad=True)
    ranges = [kind.bounded(logits) for kind in TASK_KINDS.values()]
    for bounded in filter(lambda one: one is not None, ranges):
        features = discriminator_features(bounded, vectors)
        features.sum().backward()
        assert bool((features.abs() < 10).all())
        assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


def test_the_penalty_is_the_squared_slope_by_finite_differences() -> None:
    chosen = DiscriminatorWeights(*(value.double() for value in weights().tensors()))
    points = torch.randn(4, 5)
    expected = 0.0
    for point in points.double():
        for dimension in range(5):
            step = torch.zeros(5, dtype=torch.float64)
            step[dimension] = 1e-4
            # In float64 by hand: the library's function computes in float32.
            both = [
                nn.functional.leaky_relu(
                    (point + side * step) @ chosen.w_in.t() + chosen.b_in, LEAK
                )
                @ chosen.w_out.t()
                for side in (1, -1)
            ]
            expected += 0.5 * (float(both[0] - both[1]) / 2e-4) ** 2
    assert r1_penalty(points, weights()).item() == pytest.approx(expected, rel=1e-3)


def test_the_penalty_teaches_the_weights() -> None:
    leaves = [value.requires_grad_() for value in weights().tensors()]
    with torch.no_grad():
        penalty = r1_penalty(torch.randn(4, 5), DiscriminatorWeights(*leaves))
    (slope,) = torch.autograd.grad(penalty, leaves[:1])
    assert float(slope.abs().sum()) > 0


def test_power_iteration_finds_the_largest_singular_value() -> None:
    matrix = weights().w_in * 3
    left = nn.functional.normalize(torch.randn(7), dim=0)
    for _ in range(100):
        left = power_iteration(matrix, left)
    normed = spectral_norm(matrix, left)
    torch.testing.assert_close(normed, matrix / torch.linalg.matrix_norm(matrix, 2))
    assert bool(torch.isfinite(spectral_norm(torch.zeros(7, 5), left)).all())
