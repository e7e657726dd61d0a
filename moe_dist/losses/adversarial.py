"""A discriminator tells teacher from student, and the student is rewarded for fooling it.

MicroBERT names the idea without its formulas. Ours: a two-layer network on (prediction, sentence
vector), the non-saturating loss, and spectral norm or the R1 penalty. Everything here is a
function of tensors; the weights are `moe_dist.training.adversary`'s.

Shapes: B batch, C classes, D model, N features of a sample, H hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LEAK = 0.2


@dataclass(frozen=True)
class DiscriminatorWeights:
    """Weights of the two layers.

    Args:
        w_in: (H, N).
        b_in: (H,).
        w_out: (1, H).
        b_out: (1,).
    """

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor

    def tensors(self) -> list[Tensor]:
        """List the four weights in the order of the fields."""
        return [self.w_in, self.b_in, self.w_out, self.b_out]


def discriminator_features(bounded_BC: Tensor, vectors_BD: Tensor) -> Tensor:
    """Join bounded predictions (`TaskKind.bounded`) and sentence vectors: (B, C + D) float32.

    Probabilities and normalised vectors: neither drowns the other, however large the logits are.
    """
    bounded_BC = bounded_BC.reshape(vectors_BD.shape[0], -1)
    vectors_BD = vectors_BD.float()
    return torch.cat([bounded_BC, functional.layer_norm(vectors_BD, vectors_BD.shape[-1:])], dim=-1)


def discriminator_scores(features_BN: Tensor, weights: DiscriminatorWeights) -> Tensor:
    """Score samples, (B,) float32 also under autocast: above 0 they look like the teacher's."""
    with torch.autocast(features_BN.device.type, enabled=False):
        hidden_BH = functional.linear(features_BN.float(), weights.w_in, weights.b_in)
        hidden_BH = functional.leaky_relu(hidden_BH, LEAK)
        return functional.linear(hidden_BH, weights.w_out, weights.b_out).squeeze(-1)


def discriminator_loss(teacher_scores_B: Tensor, student_scores_B: Tensor) -> Tensor:
    """Cross entropy of telling teacher and student apart, summed over samples.

    Source: arXiv:1406.2661.
    """
    return (
        functional.softplus(-teacher_scores_B.float()).sum()
        + functional.softplus(student_scores_B.float()).sum()
    )


def fooling_loss(student_scores_B: Tensor) -> Tensor:
    """``-log`` of the chance that the student is taken for the teacher, summed over samples.

    The non-saturating form: where the discriminator is sure, the gradient stays.
    Source: arXiv:1406.2661.
    """
    return functional.softplus(-student_scores_B.float()).sum()


def r1_penalty(teacher_features_BN: Tensor, weights: DiscriminatorWeights) -> Tensor:
    """Half the squared gradient of the scores at the teacher's samples, summed, unweighted.

    The gradient flows through the discriminator's weights. Source: arXiv:1801.04406.
    """
    with torch.enable_grad():
        points_BN = teacher_features_BN.detach().requires_grad_()
        scores_B = discriminator_scores(points_BN, weights)
        (slope_BN,) = torch.autograd.grad(scores_B.sum(), points_BN, create_graph=True)
        return 0.5 * slope_BN.square().sum()


def power_iteration(weight: Tensor, left: Tensor) -> Tensor:
    """Take one step towards a matrix's first left singular vector, of length 1."""
    right = functional.normalize(weight.detach().t() @ left, dim=0)
    return functional.normalize(weight.detach() @ right, dim=0)


def spectral_norm(weight: Tensor, left: Tensor) -> Tensor:
    """Divide a matrix by its largest singular value, estimated with `left` from `power_iteration`.

    Under autocast too its type stays. Source: arXiv:1802.05957.
    """
    with torch.autocast(weight.device.type, enabled=False):
        right = functional.normalize(weight.detach().t() @ left, dim=0)
        largest = torch.dot(left, weight @ right)
        return weight / largest.clamp(min=1e-12)
