"""Losses of each token over a vocabulary too large for all tokens' logits to be held at once.

Logits are made of hidden states a few tokens at a time, and once more in the backward pass.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MAX_BYTES = 256 * 2**20
"""What logits, and what is made of them, may take at a time, whatever the number of tokens."""
_TENSORS = 12
"""Tensors of a chunk's size that are held at once, at most: logits and probabilities of student
and teacher, and what the backward pass makes of them."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What logits are made of.

    Args:
        hidden_TD: what the output layer reads.
        weight_VD: of the output layer.
        bias_V: of the output layer, or None.
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None

    def logits_TV(self, hidden_TD: Tensor) -> Tensor:
        """Make some tokens' logits, float32."""
        return functional.linear(hidden_TD, self.weight_VD, self.bias_V).float()


def token_cross_entropy(scores: TokenScores, targets_T: Tensor) -> Tensor:
    """Cross entropy of each token's target, (T,) float32."""

    def losses_T(hidden_TD: Tensor, chosen_T: Tensor) -> Tensor:
        return functional.cross_entropy(scores.logits_TV(hidden_TD), chosen_T, reduction="none")

    return _in_chunks(losses_T, len(scores.weight_VD), scores.hidden_TD, targets_T)


def token_kl(student: TokenScores, teacher: TokenScores, temperature: float = 1.0) -> Tensor:
    """``KL(teacher‖student)`` of each token's softened predictions, times temperature²; (T,).

    Gradients go to the student alone.

    Args:
        student: of T tokens.
        teacher: of the same.
        temperature: divides both models' logits.

    Returns:
        Float32 of each token.

    Raises:
        ValueError: if vocabularies or tokens differ in number, or the temperature is not positive.

    Source: Hinton et al., arXiv:1503.02531; for each token Kim and Rush, arXiv:1606.07947.
    """
    if len(student.weight_VD) != len(teacher.weight_VD):
        raise ValueError(
            f"the student has a vocabulary of {len(student.weight_VD)} and the teacher one of "
            f"{len(teacher.weight_VD)}"
        )
    if len(student.hidden_TD) != len(teacher.hidden_TD):
        raise ValueError("student and teacher are to be compared on the same tokens")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def losses_T(hidden_TD: Tensor, other_TD: Tensor) -> Tensor:
        own_TV = functional.log_softmax(student.logits_TV(hidden_TD) / temperature, dim=-1)
        with torch.no_grad():
            other_TV = functional.log_softmax(teacher.logits_TV(other_TD) / temperature, dim=-1)
        gaps_T = functional.kl_div(own_TV, other_TV, reduction="none", log_target=True).sum(dim=-1)
        return temperature**2 * gaps_T

    return _in_chunks(losses_T, len(student.weight_VD), student.hidden_TD, teacher.hidden_TD)


def _in_chunks(compute: Callable[[Tensor, Tensor], Tensor], width: int, *rows: Tensor) -> Tensor:
    """Compute (T,) values of rows of two tensors, so many rows at a time as memory is set for."""
    own, other = rows
    num_rows = max(1, MAX_BYTES // (_TENSORS * width * torch.float32.itemsize))
    parts = [
        checkpoint(compute, *pair, use_reentrant=False, preserve_rng_state=False)
        for pair in zip(own.split(num_rows), other.split(num_rows), strict=True)
    ]
    return torch.cat(parts)
