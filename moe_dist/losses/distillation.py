"""What pulls a student to its teacher: predictions and hidden states.

Each loss is a sum (over samples, or over real tokens), so that a caller who divides by the counts
of the whole optimizer step gets the same mean however the step was cut into pieces.

Shapes: B batch, C classes, S sequence, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def prediction_kl(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float = 1.0
) -> Tensor:
    """Symmetric Kullback-Leibler divergence, ``½ (KL(p‖q) + KL(q‖p))``, of the predictions.

    Computed as ``½ Σ (p - q)(log p - log q)`` from log-softmax, which neither divides nor takes
    the logarithm of a probability, so that extreme logits give finite values and gradients.
    Scaled by the temperature's square, which keeps the gradient's size.

    Args:
        student_logits_BC: scores before softmax.
        teacher_logits_BC: the same of the teacher, without gradient.
        temperature: divides both; 1 leaves them.

    Returns:
        Scalar, summed over samples.

    Raises:
        ValueError: if the shapes differ or the temperature is not positive.

    Source: SMART, arXiv:1911.03437, as used by MoEBERT; the square from arXiv:1503.02531.
    """
    student_BC, teacher_BC = _softened(student_logits_BC, teacher_logits_BC, temperature)
    gap_BC = (student_BC.exp() - teacher_BC.exp()) * (student_BC - teacher_BC)
    return 0.5 * temperature**2 * gap_BC.sum()


def soft_targets(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float = 1.0
) -> Tensor:
    """``KL(teacher‖student)`` of softened predictions, times temperature², summed over samples.

    Source: Hinton et al., arXiv:1503.02531. Extreme logits stay finite, as in `prediction_kl`.
    """
    student_BC, teacher_BC = _softened(student_logits_BC, teacher_logits_BC, temperature)
    return temperature**2 * (teacher_BC.exp() * (teacher_BC - student_BC)).sum()


def prediction_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared error of (B, 1) or (B,) predictions, summed: `prediction_kl` for regression."""
    return functional.mse_loss(student_logits.float(), teacher_logits.float(), reduction="sum")


def hidden_mse(
    student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], mask_BS: Tensor | None
) -> Tensor:
    """Mean squared error of hidden states, layer against layer, padding excluded.

    Args:
        student_hidden: (B, S, D) of the embeddings and each layer.
        teacher_hidden: the same of the teacher, without gradient.
        mask_BS: True or 1 for real tokens; None if all are real.

    Returns:
        Scalar: mean over the width, summed over real tokens and over layers.

    Raises:
        ValueError: if the layers differ in number or shape.

    Source: MoEBERT, NAACL 2022.
    """
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"the student has {len(student_hidden)} hidden states and the teacher "
            f"{len(teacher_hidden)}; matching them one to one needs models of equal depth"
        )
    if not student_hidden:
        raise ValueError("no hidden states: run both models with output_hidden_states=True")
    device = student_hidden[0].device
    total = torch.zeros((), dtype=torch.float32, device=device)
    for student_BSD, teacher_BSD in zip(student_hidden, teacher_hidden, strict=True):
        if student_BSD.shape != teacher_BSD.shape:
            raise ValueError(
                f"hidden states {tuple(student_BSD.shape)} and {tuple(teacher_BSD.shape)} differ; "
                "matching them directly needs models of equal width"
            )
        total = total + _SquaredGap.apply(student_BSD, teacher_BSD, mask_BS)
    return total


class _SquaredGap(torch.autograd.Function):
    """The loss of one layer, which reads and writes hidden states as few times as it can."""

    @staticmethod
    def forward(
        ctx: Any, student_BSD: Tensor, teacher_BSD: Tensor, mask_BS: Tensor | None
    ) -> Tensor:
        gap_BSD = student_BSD.float() - teacher_BSD.float()
        if mask_BS is not None:
            # Selecting and not multiplying: padding may hold NaN, and NaN times zero is NaN.
            gap_BSD.masked_fill_(~mask_BS.bool().unsqueeze(-1), 0.0)
        ctx.save_for_backward(gap_BSD)
        ctx.dtypes = student_BSD.dtype, teacher_BSD.dtype
        # A sum of short ones: a single chain of so many numbers would round the small ones away.
        return torch.linalg.vecdot(gap_BSD, gap_BSD).sum() / gap_BSD.shape[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gap_BSD,) = ctx.saved_tensors
        grad_BSD = gap_BSD * (2 * grad / gap_BSD.shape[-1])
        of_student, of_teacher = ctx.dtypes
        return (
            grad_BSD.to(of_student) if ctx.needs_input_grad[0] else None,
            -grad_BSD.to(of_teacher) if ctx.needs_input_grad[1] else None,
            None,
        )


def _softened(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logarithms of both softened predictions."""
    if student_logits_BC.shape != teacher_logits_BC.shape:
        raise ValueError(
            f"student logits {tuple(student_logits_BC.shape)} and teacher logits "
            f"{tuple(teacher_logits_BC.shape)} differ in shape"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student_BC = functional.log_softmax(student_logits_BC.float() / temperature, dim=-1)
    teacher_BC = functional.log_softmax(teacher_logits_BC.float() / temperature, dim=-1)
    return student_BC, teacher_BC
