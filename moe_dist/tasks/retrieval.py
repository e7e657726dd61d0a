"""Where the right passage comes among all, by the cosine of vectors.

Shapes: N questions, M passages, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MAX_COSINES = 2**24
"""So many are held at a time: 64 MiB."""
_ROUNDING = 1e-6
"""Equal vectors may get cosines that differ by so much."""


def ranks(questions_ND: Tensor, passages_MD: Tensor, answer_N: Tensor) -> Tensor:
    """Rank the right passage of each question, 1 for the first; ties count against it.

    Args:
        questions_ND: vectors of questions, of any length but 0.
        passages_MD: vectors of distinct passages, on the same device.
        answer_N: the position of each question's passage, int64.

    Returns:
        (N,) int64. What is no number ranks behind everything.
    """
    passages_MD = functional.normalize(passages_MD.float(), dim=-1)
    chunk = max(1, MAX_COSINES // len(passages_MD))
    found = []
    for start in range(0, len(questions_ND), chunk):
        part_BD = functional.normalize(questions_ND[start : start + chunk].float(), dim=-1)
        own_B1 = answer_N[start : start + chunk, None]
        cosine_BM = part_BD @ passages_MD.T
        right_B1 = cosine_BM.gather(1, own_B1)
        # Not `>=`, which no NaN fulfils: a broken vector would come first.
        ahead_BM = ~(cosine_BM < right_B1 - _ROUNDING)
        ahead_BM.scatter_(1, own_B1, value=True)
        found.append(ahead_BM.sum(dim=1))
    return torch.cat(found) if found else answer_N.new_zeros(0)
