"""Losses of each token over a vocabulary too large for all tokens' logits to be held at once.

Logits are made of hidden states a few tokens at a time. Their gradients are taken while they are
there: to make them once more in the backward pass, as gradient checkpointing would, costs half as
many matrix products again, and the output layer of a small language model is a fifth of it.

Shapes: T tokens (of a chunk too), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

MAX_BYTES = 256 * 2**20
"""What logits, and what is made of them, may take at a time, whatever the number of tokens."""
_LAYERS = 2
"""Times what the weights of the output layer take in float32, if that is more than `MAX_BYTES`."""
_TENSORS = 6
"""Tensors of a chunk's size that are held at once, at most: logits of student and teacher,
probabilities, and what is made of them in turn."""


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


def token_cross_entropy(scores: TokenScores, targets_T: Tensor) -> Tensor:
    """Cross entropy of each token's target, (T,) float32."""
    return _token_losses(scores, _CrossEntropy(targets_T))


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
    return _token_losses(student, _Divergence(_OutputLayer.of(teacher), temperature))


class _OutputLayer:
    """Makes logits in the precision that autocast asks for; weights are brought to it once."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        device = hidden_TD.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else weight_VD.dtype
        self.hidden_TD = hidden_TD.detach().to(self.dtype)
        self.weight_VD = weight_VD.detach().to(self.dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(self.dtype)

    @classmethod
    def of(cls, scores: TokenScores) -> _OutputLayer:
        return cls(scores.hidden_TD, scores.weight_VD, scores.bias_V)

    def logits_TV(self, rows: slice) -> Tensor:
        """Make some tokens' logits, float32; the caller may overwrite them."""
        return functional.linear(self.hidden_TD[rows], self.weight_VD, self.bias_V).float()


_NOTHING = (False, False, False)


class _Loss(Protocol):
    """A loss of each token on its own."""

    def values_T(self, logits_TV: Tensor, rows: slice) -> Tensor:
        """Take a chunk's losses, and leave in `logits_TV` their gradients by it."""
        ...


@dataclass(frozen=True, eq=False)
class _CrossEntropy:
    targets_T: Tensor

    def values_T(self, logits_TV: Tensor, rows: slice) -> Tensor:
        chosen_T1 = self.targets_T[rows, None]
        own_TV = functional.log_softmax(logits_TV, dim=-1)
        loss_T = -own_TV.gather(1, chosen_T1)[:, 0]
        torch.exp(own_TV, out=logits_TV)
        logits_TV.scatter_add_(1, chosen_T1, -torch.ones_like(loss_T)[:, None])
        return loss_T


@dataclass(frozen=True, eq=False)
class _Divergence:
    teacher: _OutputLayer
    temperature: float

    def values_T(self, logits_TV: Tensor, rows: slice) -> Tensor:
        other_TV = self.teacher.logits_TV(rows)
        if self.temperature != 1.0:
            logits_TV.div_(self.temperature)
            other_TV.div_(self.temperature)
        own_TV = functional.log_softmax(logits_TV, dim=-1)
        other_TV = functional.log_softmax(other_TV, dim=-1)
        probability_TV = torch.exp(other_TV, out=logits_TV)
        loss_T = other_TV.sub_(own_TV).mul_(probability_TV).sum(dim=-1)
        torch.sub(own_TV.exp_(), probability_TV, out=logits_TV)
        if self.temperature != 1.0:
            logits_TV.mul_(self.temperature)
        return self.temperature**2 * loss_T


def _token_losses(scores: TokenScores, loss: _Loss) -> Tensor:
    inputs = (scores.hidden_TD, scores.weight_VD, scores.bias_V)
    if not torch.is_grad_enabled():
        return _differentiate(_OutputLayer(*inputs), loss, _NOTHING)[0]
    losses_T: Tensor = _TokenLosses.apply(*inputs, loss)
    return losses_T


class _TokenLosses(torch.autograd.Function):
    """Losses of all tokens, and the gradients of their sum.

    A batch's tokens nearly always count alike in training, so that its gradients are those of the
    sum times one number. Where they do not, the output layer's are computed anew in the backward
    pass; a token's hidden state has a loss of its own, so that its gradient is only weighed.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, loss: _Loss
    ) -> Tensor:
        inputs = (hidden_TD, weight_VD, bias_V)
        ctx.layer, ctx.loss, ctx.wanted = _OutputLayer(*inputs), loss, ctx.needs_input_grad[:3]
        ctx.dtypes = [None if one is None else one.dtype for one in inputs]
        losses_T, ctx.grads = _differentiate(ctx.layer, loss, ctx.wanted)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_T: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden_TD, *of_layer = ctx.grads
        if of_hidden_TD is not None:
            of_hidden_TD = of_hidden_TD * weight_T[:, None].to(of_hidden_TD.dtype)
        if any(ctx.wanted[1:]):
            if len(weight_T) == 0 or bool((weight_T == weight_T[0]).all()):
                factor = weight_T[:1].sum()
                of_layer = [None if one is None else one * factor for one in of_layer]
            else:
                wanted = (False, *ctx.wanted[1:])
                _, (_, *of_layer) = _differentiate(ctx.layer, ctx.loss, wanted, weight_T)
        grads = [of_hidden_TD, *of_layer]
        typed = zip(grads, ctx.dtypes, strict=True)
        return *(None if one is None else one.to(dtype) for one, dtype in typed), None


def _differentiate(
    layer: _OutputLayer, loss: _Loss, wanted: Sequence[bool], weight_T: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Take the losses, (T,), and the gradients of their weighted sum that are wanted.

    Gradients are by hidden states (T, D), weights (V, D) and bias (V,), the last two float32.
    """
    whole = (layer.hidden_TD, layer.weight_VD, layer.bias_V)
    dtypes = (layer.dtype, torch.float32, torch.float32)
    of_hidden_TD, of_weight_VD, of_bias_V = grads = [
        torch.zeros_like(one, dtype=dtype) if one is not None and needed else None
        for one, dtype, needed in zip(whole, dtypes, wanted, strict=True)
    ]
    losses_T = torch.zeros(len(layer.hidden_TD), device=layer.hidden_TD.device)
    with torch.autocast(layer.hidden_TD.device.type, enabled=False):
        for rows in _chunks(layer):
            logits_TV = layer.logits_TV(rows)
            losses_T[rows] = loss.values_T(logits_TV, rows)
            if weight_T is not None:
                logits_TV.mul_(weight_T[rows, None])
            grad_TV = logits_TV.to(layer.dtype)
            if of_hidden_TD is not None:
                of_hidden_TD[rows] = grad_TV @ layer.weight_VD
            if of_weight_VD is not None:
                of_weight_VD += grad_TV.T @ layer.hidden_TD[rows]
            if of_bias_V is not None:
                of_bias_V += logits_TV.sum(dim=0)
    return losses_T, grads


def _chunks(layer: _OutputLayer) -> Iterator[slice]:
    """So many tokens at a time as memory is set for.

    A wide layer's are so many at least that the gradient of its weights, to which each chunk adds,
    is read and written seldom.
    """
    row_bytes = _TENSORS * len(layer.weight_VD) * torch.float32.itemsize
    most_bytes = max(MAX_BYTES, _LAYERS * layer.weight_VD.numel() * torch.float32.itemsize)
    num_rows = max(1, most_bytes // row_bytes)
    for start in range(0, len(layer.hidden_TD), num_rows):
        yield slice(start, start + num_rows)
