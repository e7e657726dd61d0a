"""How far a student is from its teacher on each sample: measured, never trained on.

Accuracy on a small dev set moves in steps of a sample and tells two students apart only where they
differ by points. These say for every sample how much of the teacher is missed.

Shapes: B batch, C classes, S sequence, D model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
