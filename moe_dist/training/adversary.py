"""The discriminator of a run: its weights, its own optimizer, and when it is switched off.

Weights and moments are buffers of a module beside the student. So the student's optimizer never
sees them, while every checkpoint carries them like any tensor, at any world size. Gradients are
summed over ranks and divided by the samples of the whole step: one process and many take the same
update.

Shapes: B batch, N features of a sample, H hidden units.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from moe_dist.losses.adversarial import (
    DiscriminatorWeights,
    discriminator_loss,
    discriminator_scores,
    fooling_loss,
    power_iteration,
    r1_penalty,
    spectral_norm,
)
from moe_dist.training.collectives import own_rank, sum_over_ranks

HIDDEN_UNITS = 128
BETAS = (0.5, 0.999)
R1_WEIGHT = 1.0
SMOOTHING = 0.98
FIRST_ITERATIONS = 20
MAX_FOOLING_LOSS = 5.0
"""A student that is found out in all but 0.7 % of cases learns nothing more from being told so."""

_NAMES = ("w_in", "b_in", "w_out", "b_out")

logger = logging.getLogger(__name__)


class Adversary(nn.Module):
    """A two-layer discriminator that is trained once for each step of the student.

    It is switched off for good when it diverges: when a loss or a gradient of it is not finite, or
    when the student's smoothed loss passes `MAX_FOOLING_LOSS`, where it has won for good.

    Args:
        num_features: N.
        regularizer: ``spectral`` or ``r1``.
        learning_rate: of its Adam.
        seed: of its weights.
    """

    steps: Tensor
    active: Tensor
    fooling: Tensor
    left_in: Tensor
    left_out: Tensor

    def __init__(
        self, num_features: int, *, regularizer: str, learning_rate: float, seed: int
    ) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.learning_rate = learning_rate
        generator = torch.Generator().manual_seed(seed)
        for name, shape, fan_in in (
            ("w_in", (HIDDEN_UNITS, num_features), num_features),
            ("b_in", (HIDDEN_UNITS,), 0),
            ("w_out", (1, HIDDEN_UNITS), HIDDEN_UNITS),
            ("b_out", (1,), 0),
        ):
            drawn = torch.randn(shape, generator=generator) * fan_in**-0.5 if fan_in else None
            self.register_buffer(name, torch.zeros(shape) if drawn is None else drawn)
            self.register_buffer(f"exp_avg_{name}", torch.zeros(shape))
            self.register_buffer(f"exp_avg_sq_{name}", torch.zeros(shape))
        for name, weight in (("left_in", "w_in"), ("left_out", "w_out")):
            left = torch.randn(self.get_buffer(weight).shape[0], generator=generator)
            for _ in range(FIRST_ITERATIONS):
                left = power_iteration(self.get_buffer(weight), left)
            self.register_buffer(name, left)
        # Of one element and not of none: what checkpoints gather has a size.
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("active", torch.ones(1))
        self.register_buffer("fooling", torch.full((1,), 2.0).log())
        self._seen: list[tuple[Tensor, Tensor]] = []

    def student_loss(self, student_features_BN: Tensor, teacher_features_BN: Tensor) -> Tensor:
        """Reward the student for being taken for the teacher; keeps both samples for `update`.

        Scalar, summed over samples; 0 without a gradient once the discriminator is off.
        """
        self._seen.append((student_features_BN.detach(), teacher_features_BN.detach()))
        loss = fooling_loss(
            discriminator_scores(student_features_BN, self._effective(self._weights()))
        )
        return torch.where(self.active[0] > 0, loss, torch.zeros_like(loss))

    def update(self, num_samples: int) -> dict[str, float]:
        """Train the discriminator on the samples since the last update; collective.

        Args:
            num_samples: of the whole step, over ranks and micro-batches.

        Returns:
            What the metric log shows: the discriminator's loss, how often it is right about
            teacher and student, the student's smoothed loss, and whether it is on.
        """
        seen, self._seen = self._seen, []
        # An accelerator is read twice a step, here and below, since each read waits for it.
        active, steps, smoothed = torch.cat([self.active, self.steps, self.fooling]).tolist()
        if active == 0.0 or not seen:
            return {"adversarial/active": active}
        student_BN = torch.cat([student for student, _ in seen])
        teacher_BN = torch.cat([teacher for _, teacher in seen])
        gradients, facts = self._gradients(student_BN, teacher_BN, num_samples)
        loss, right_teacher, right_student, fooling, sound = facts.tolist()
        smoothed = SMOOTHING * smoothed + (1 - SMOOTHING) * fooling
        if sound and smoothed <= MAX_FOOLING_LOSS:
            self.fooling.fill_(smoothed)
            self._step(gradients, steps)
        else:
            active, smoothed = 0.0, smoothed if math.isfinite(smoothed) else 0.0
            self._switch_off(smoothed)
        return {
            "adversarial/discriminator_loss": loss,
            "adversarial/right_about_teacher": right_teacher,
            "adversarial/right_about_student": right_student,
            "adversarial/student_loss_smoothed": smoothed,
            "adversarial/active": active,
        }

    def _weights(self) -> DiscriminatorWeights:
        return DiscriminatorWeights(*(self.get_buffer(name) for name in _NAMES))

    def _effective(self, weights: DiscriminatorWeights) -> DiscriminatorWeights:
        if self.regularizer != "spectral":
            return weights
        return DiscriminatorWeights(
            spectral_norm(weights.w_in, self.left_in),
            weights.b_in,
            spectral_norm(weights.w_out, self.left_out),
            weights.b_out,
        )

    def _gradients(
        self, student_BN: Tensor, teacher_BN: Tensor, num_samples: int
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients and figures of the step, the last whether all are finite; on all ranks."""
        with torch.enable_grad():
            leaves = [tensor.clone().requires_grad_() for tensor in self._weights().tensors()]
            weights = self._effective(DiscriminatorWeights(*leaves))
            student_B = discriminator_scores(student_BN, weights)
            teacher_B = discriminator_scores(teacher_BN, weights)
            loss = discriminator_loss(teacher_B, student_B)
            if self.regularizer == "r1":
                loss = loss + R1_WEIGHT * r1_penalty(teacher_BN, weights)
            own = torch.autograd.grad(loss, leaves)
        facts = torch.stack(
            [
                loss.detach(),
                (teacher_B > 0).sum().float(),
                (student_B < 0).sum().float(),
                fooling_loss(student_B.detach()),
            ]
        )
        flat = torch.cat([*(gradient.reshape(-1) for gradient in own), facts])
        flat = sum_over_ranks(flat) / num_samples
        parts = flat.split([*(gradient.numel() for gradient in own), facts.numel()])
        gradients = [part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=False)]
        sound = torch.isfinite(flat).all().to(flat.dtype)
        return gradients, torch.cat([parts[-1], sound.view(1)])

    def _step(self, gradients: list[Tensor], steps: float) -> None:
        with torch.no_grad():
            weights = self._weights()
            self.left_in.copy_(power_iteration(weights.w_in, self.left_in))
            self.left_out.copy_(power_iteration(weights.w_out, self.left_out))
            # `adam` counts for each tensor, and reads the counts; they all take the same steps.
            counts = [torch.tensor(steps, device="cpu") for _ in gradients]
            adam(
                weights.tensors(),
                gradients,
                [self.get_buffer(f"exp_avg_{name}") for name in _NAMES],
                [self.get_buffer(f"exp_avg_sq_{name}") for name in _NAMES],
                [],
                counts,
                foreach=False,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=self.learning_rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
            self.steps.add_(1)

    def _switch_off(self, smoothed: float) -> None:
        self.active.zero_()
        # What is saved and logged stays finite.
        self.fooling.fill_(smoothed)
        if own_rank() == 0:
            logger.warning(
                "the discriminator diverged and is switched off; the student goes on with its "
                "other losses (lower distill.adversarial_learning_rate, or try the other "
                "distill.adversarial_regularizer)"
            )
