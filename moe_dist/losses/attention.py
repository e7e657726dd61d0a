"""What pulls a student's attention to its teacher's.

Shapes: B batch, H heads, S sequence, D model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_scores(query_BSD: Tensor, key_BSD: Tensor, num_heads: int) -> Tensor:
    """Compute (B, H, S, S) scores before softmax, divided by the root of the head size.

    In float32 even under autocast; queries and keys hold all heads side by side.
    """
    with torch.autocast(query_BSD.device.type, enabled=False):
        query_BSHD = query_BSD.float().unflatten(-1, (num_heads, -1))
        key_BSHD = key_BSD.float().unflatten(-1, (num_heads, -1))
        scores_BHSS = torch.einsum("bqhd,bkhd->bhqk", query_BSHD, key_BSHD)
    return scores_BHSS / query_BSHD.shape[-1] ** 0.5


def attention_mse(
    student_scores: Sequence[Tensor], teacher_scores: Sequence[Tensor], mask_BS: Tensor | None
) -> Tensor:
    """Mean squared error of attention scores, layer against layer, padding excluded.

    A sentence's error is the mean over its pairs of real tokens, so that neither its length nor
    the padding of its batch changes what it weighs.

    Args:
        student_scores: (B, H, S, S) of each compared layer, before softmax.
        teacher_scores: the same of the teacher, without gradient.
        mask_BS: True or 1 for real tokens; None if all are real.

    Returns:
        Scalar: mean over heads and pairs, summed over samples and over layers.

    Raises:
        ValueError: if the layers differ in number or shape, or there are none.

    Source: TinyBERT, arXiv:1909.10351, with the mean over real pairs only.
    """
    if len(student_scores) != len(teacher_scores) or not student_scores:
        raise ValueError(
            f"{len(student_scores)} student layers and {len(teacher_scores)} teacher layers: "
            "give one or more pairs"
        )
    total = torch.zeros((), dtype=torch.float32, device=student_scores[0].device)
    for student_BHSS, teacher_BHSS in zip(student_scores, teacher_scores, strict=True):
        if student_BHSS.shape != teacher_BHSS.shape:
            raise ValueError(
                f"attention scores {tuple(student_BHSS.shape)} and {tuple(teacher_BHSS.shape)} "
                "differ; comparing them needs equally many heads"
            )
        gap_BHSS = student_BHSS.float() - teacher_BHSS.float()
        if mask_BS is None:
            pairs_B: Tensor | int = gap_BHSS.shape[-1] ** 2
        else:
            real_BS = mask_BS.bool()
            real_BSS = real_BS.unsqueeze(-1) & real_BS.unsqueeze(-2)
            gap_BHSS = gap_BHSS.masked_fill(~real_BSS.unsqueeze(1), 0.0)
            pairs_B = real_BSS.sum(dim=(1, 2)).clamp(min=1)
        error_B = gap_BHSS.square().sum(dim=(2, 3)).mean(dim=1) / pairs_B
        total = total + error_B.sum()
    return total
