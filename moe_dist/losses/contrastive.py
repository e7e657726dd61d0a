"""Telling a text's own second text from those of other pairs.

Shapes: N pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SCALE = 20.0
"""What cosines are multiplied by: a temperature of 0.05."""


def in_batch_negatives(first_ND: Tensor, second_ND: Tensor, texts_N2: Tensor) -> Tensor:
    """Cross entropy of finding to each first text its own second one among those of all pairs.

    What answers it too is left out: a second text that is equal to its own or to the first text
    itself, or that belongs to an equal first text.

    Args:
        first_ND: vectors of any length, of which the direction counts.
        second_ND: the same of the second texts.
        texts_N2: of each pair a whole number for either text; equal texts have equal ones.

    Returns:
        (N,) float32.

    Source: arXiv:1705.00652; sentence-transformers' MultipleNegativesRankingLoss.
    """
    # Under autocast a product would be in half precision, and the scale would enlarge its error.
    with torch.autocast(first_ND.device.type, enabled=False):
        first_ND, second_ND = (functional.normalize(side.float()) for side in (first_ND, second_ND))
        scores_NN = SCALE * first_ND @ second_ND.T
    first_N, second_N = texts_N2.unbind(dim=1)
    answers_NN = (texts_N2[:, None] == texts_N2[None]).any(dim=-1) | (first_N[:, None] == second_N)
    answers_NN = answers_NN.fill_diagonal_(False)
    own_N = torch.arange(len(scores_NN), device=scores_NN.device)
    return functional.cross_entropy(
        scores_NN.masked_fill(answers_NN, -torch.inf), own_N, reduction="none"
    )
