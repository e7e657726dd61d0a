"""What pulls a student's features to its teacher's: sentence vectors and projected states.

Shapes: B batch, S sequence, D model (the teacher's, where both meet).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.losses.distillation import hidden_mse


def cls_vector(hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Take the state of the first real token, (B, D) float32; padding may stand before it."""
    if mask_BS is None:
        return hidden_BSD[:, 0].float()
    first_B = mask_BS.int().argmax(dim=1)
    return hidden_BSD[torch.arange(len(first_B), device=first_B.device), first_B].float()


def mean_vector(hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Average the states of real tokens, all where there is no mask: (B, D) float32."""
    if mask_BS is None:
        return hidden_BSD.float().mean(dim=1)
    real_BS1 = mask_BS.bool().unsqueeze(-1)
    total_BD = hidden_BSD.float().masked_fill(~real_BS1, 0.0).sum(dim=1)
    return total_BD / real_BS1.sum(dim=1).clamp(min=1)


def max_vector(hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Take each dimension's maximum over real tokens, over all without a mask: (B, D) float32."""
    hidden_BSD = hidden_BSD.float()
    if mask_BS is not None:
        lowest = torch.finfo(torch.float32).min
        hidden_BSD = hidden_BSD.masked_fill(~mask_BS.bool().unsqueeze(-1), lowest)
    return hidden_BSD.amax(dim=1)


POOLINGS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "cls": cls_vector,
    "mean": mean_vector,
    "max": max_vector,
}


def alignment_mse(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Squared distance of sentence vectors of one width: mean over it, summed over samples.

    Source: MicroBERT, Appl. Sci. 2024, 14, 6171, names the loss without its formula; the squared
    distance is our choice.
    """
    if student_BD.shape != teacher_BD.shape:
        raise ValueError(
            f"sentence vectors {tuple(student_BD.shape)} and {tuple(teacher_BD.shape)} differ; "
            "map the student's to the teacher's width first"
        )
    gap_BD = student_BD.float() - teacher_BD.float()
    return gap_BD.square().sum() / gap_BD.shape[-1]


def mapping_mse(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    projections: Sequence[Tensor],
    mask_BS: Tensor | None,
) -> Tensor:
    """Squared distance after a learned projection of each layer's own: feature mapping.

    Unlike `hidden_mse` it lets a layer keep what it knows in coordinates of its own. Only the
    student is projected, so the projections cannot make the loss small by making all alike.

    Args:
        student_hidden: (B, S, D of the student) of each compared layer.
        teacher_hidden: (B, S, D) of the teacher, without gradient.
        projections: (D, D of the student) for each of them.
        mask_BS: True or 1 for real tokens; None if all are real.

    Returns:
        Scalar: mean over the width, summed over real tokens and over layers.

    Raises:
        ValueError: if there is not one projection for each layer.

    Source: FitNets, arXiv:1412.6550; which layers meet is TinyBERT's map.
    """
    if len(projections) != len(student_hidden):
        raise ValueError(
            f"{len(projections)} projections for {len(student_hidden)} layers: give one for each"
        )
    with torch.autocast(projections[0].device.type, enabled=False):
        projected = [
            functional.linear(hidden_BSD.float(), weight.float())
            for hidden_BSD, weight in zip(student_hidden, projections, strict=True)
        ]
    return hidden_mse(projected, teacher_hidden, mask_BS)
