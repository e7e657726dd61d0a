"""How far a student is from its teacher on each sample: measured, never trained on.

Accuracy on a small dev set moves in steps of a sample and tells two students apart only where they
differ by points. These say for every sample how much of the teacher is missed.

Shapes: B batch, C classes, S sequence, D model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.losses.distillation import prediction_kl


def hidden_errors(
    student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], mask_BS: Tensor | None
) -> Tensor:
    """Part of the teacher's hidden states that a student misses.

    In each layer the squared distance over all real tokens of a sample, divided by the teacher's
    squared length there; then the mean over layers. A student that gives zeros has 1.

    Args:
        student_hidden: (B, S, D) of each layer.
        teacher_hidden: the same of the teacher.
        mask_BS: True or 1 for real tokens; None if all are real.

    Returns:
        (B,) float32.

    Raises:
        ValueError: if the layers differ in number or shape, or there are none.
    """
    shapes = [[state.shape for state in states] for states in (student_hidden, teacher_hidden)]
    if shapes[0] != shapes[1] or not student_hidden:
        raise ValueError(
            f"hidden states of {len(student_hidden)} and {len(teacher_hidden)} layers cannot be "
            "compared one to one; give models of equal depth and width"
        )
    parts = []
    for student_BSD, teacher_BSD in zip(student_hidden, teacher_hidden, strict=True):
        gap_BSD, whole_BSD = student_BSD.float() - teacher_BSD.float(), teacher_BSD.float()
        if mask_BS is not None:
            # Selecting and not multiplying: padding may hold NaN, and NaN times zero is NaN.
            padding = ~mask_BS.bool().unsqueeze(-1)
            gap_BSD, whole_BSD = gap_BSD.masked_fill(padding, 0), whole_BSD.masked_fill(padding, 0)
        whole_B = whole_BSD.square().sum(dim=(1, 2)).clamp(min=1e-12)
        parts.append(gap_BSD.square().sum(dim=(1, 2)) / whole_B)
    return torch.stack(parts).mean(dim=0)


def prediction_errors(student_BC: Tensor, teacher_BC: Tensor, *, is_regression: bool) -> Tensor:
    """Distance of a student's prediction from its teacher's.

    Args:
        student_BC: scores before softmax, or the single output.
        teacher_BC: the same of the teacher.
        is_regression: whether the output is a number.

    Returns:
        (B,) float32: the symmetric Kullback-Leibler divergence, or the squared difference.
    """
    if is_regression:
        return (student_BC.float() - teacher_BC.float()).square().flatten(1).sum(dim=1)
    return torch.func.vmap(prediction_kl)(student_BC, teacher_BC)
