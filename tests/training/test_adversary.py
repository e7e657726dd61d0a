"""The discriminator in training: against torch's own optimizer, in parts, and going wrong."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from moe_dist.losses.adversarial import (
    LEAK,
    DiscriminatorWeights,
    discriminator_loss,
    discriminator_scores,
    r1_penalty,
)
from moe_dist.training.adversary import BETAS, HIDDEN_UNITS, R1_WEIGHT, Adversary


def make(regularizer: str = "r1", learning_rate: float = 1e-2) -> Adversary:
    return Adversary(6, regularizer=regularizer, learning_rate=learning_rate, seed=3)


def samples(seed: int = 0, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(count, 6, generator=generator)
    return student, torch.randn(count, 6, generator=generator) + 0.5


def test_updates_equal_torchs_adam_on_the_same_network() -> None:
    own = make()
    network = nn.Sequential(
        nn.Linear(6, HIDDEN_UNITS), nn.LeakyReLU(LEAK), nn.Linear(HIDDEN_UNITS, 1)
    )
    with torch.no_grad():
        for parameter, name in zip(
            network.parameters(), ("w_in", "b_in", "w_out", "b_out"), strict=True
        ):
            parameter.copy_(own.get_buffer(name))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=BETAS)
    for seed in range(3):
        student, teacher = samples(seed)
        own.student_loss(student, teacher)
        own.update(8)
        weights = DiscriminatorWeights(*network.parameters())
        loss = discriminator_loss(
            discriminator_scores(teacher, weights), discriminator_scores(student, weights)
        )
        loss = (loss + R1_WEIGHT * r1_penalty(teacher, weights)) / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter, name in zip(
        network.parameters(), ("w_in", "b_in", "w_out", "b_out"), strict=True
    ):
        torch.testing.assert_close(own.get_buffer(name), parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("regularizer", ["spectral", "r1"])
def test_micro_batches_add_up_and_a_saved_state_goes_on(regularizer: str) -> None:
    whole, cut = make(regularizer), make(regularizer)
    for seed in range(2):
        student, teacher = samples(seed)
        whole.student_loss(student, teacher)
        for part in (slice(0, 3), slice(3, 8)):
            cut.student_loss(student[part], teacher[part])
        told = whole.update(8)
        assert cut.update(8) == pytest.approx(told, rel=1e-4)
        resumed = make(regularizer)
        resumed.load_state_dict(cut.state_dict())
        cut = resumed
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not list(whole.parameters()), "the student's optimizer must not see it"


@pytest.mark.parametrize("regularizer", ["spectral", "r1"])
def test_it_learns_to_tell_and_the_student_is_taught_to_fool(regularizer: str) -> None:
    adversary = make(regularizer)
    for seed in range(60):
        student, teacher = samples(seed, 32)
        adversary.student_loss(student, teacher + 2.0)
        told = adversary.update(32)
    assert told["adversarial/right_about_teacher"] > 0.8
    assert told["adversarial/right_about_student"] > 0.8
    assert told["adversarial/active"] == 1.0
    student = student.clone().requires_grad_()
    loss = adversary.student_loss(student, teacher)
    loss.backward()
    assert student.grad is not None
    with torch.no_grad():
        moved = student - 0.5 * student.grad
    assert float(adversary.student_loss(moved, teacher)) < float(loss.detach())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_discriminator_that_is_not_finite_is_switched_off(
    broken: float, caplog: pytest.LogCaptureFixture
) -> None:
    adversary = make()
    student, teacher = samples()
    before = copy.deepcopy(adversary.state_dict())
    adversary.student_loss(student, teacher * broken)
    logging.getLogger("moe_dist").propagate = True
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        assert adversary.update(8)["adversarial/active"] == 0.0
    assert "switched off" in caplog.text
    for name in ("w_in", "b_in", "w_out", "b_out"):
        assert torch.equal(adversary.get_buffer(name), before[name])
    assert all(bool(torch.isfinite(value).all()) for value in adversary.state_dict().values())
    student.requires_grad_()
    loss = adversary.student_loss(student, teacher)
    loss.backward()
    assert loss.item() == 0.0 and bool((student.grad == 0).all())  # type: ignore[union-attr]
    assert adversary.update(8) == {"adversarial/active": 0.0}


def test_a_discriminator_that_has_won_is_switched_off() -> None:
    adversary = make(learning_rate=1e-9)
    with torch.no_grad():
        adversary.get_buffer("b_out").fill_(-20.0)
    student, teacher = samples()
    told = {}
    for _ in range(200):
        adversary.student_loss(student, teacher)
        told = adversary.update(8)
        if told["adversarial/active"] == 0.0:
            break
    assert told["adversarial/active"] == 0.0
