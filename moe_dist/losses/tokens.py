"""Losses of each token over a vocabulary too large for all tokens' logits to be held at once.

Logits are made of hidden states a few tokens at a time. Their gradients are taken while they are
there: to make them once more in the backward pass, as gradient checkpointing would, costs half as
many matrix products again, and the output layer of a small language model is a fifth of it.

Shapes: T tokens (of a chunk too), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

MAX_BYTES = 256 * 2**20
"""What logits, and what is made of them, may take at a time, whatever the number of tokens."""
CACHED_BYTES = 2**20
"""What a float32 tensor of logits takes on a CPU, for the next operator to find it in the cache."""
_LAYERS = 2
"""Times what the weights of the output layer take in float32, if that is more than `MAX_BYTES`."""
_TENSORS = 4
"""Float32 tensors that are held at once, at most, of the logits that are compared at a time."""


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

    def logits_TV(self, rows: slice, out_TV: Tensor | None = None) -> Tensor:
        """Make some tokens' logits, in `out_TV` if it is given; the caller may overwrite them."""
        hidden_TD, weight_DV = self.hidden_TD[rows], self.weight_VD.t()
        if self.bias_V is None:
            return torch.mm(hidden_TD, weight_DV, out=out_TV)
        return torch.addmm(self.bias_V, hidden_TD, weight_DV, out=out_TV)


_NOTHING = (False, False, False)


class _Loss(Protocol):
    """A loss of each token on its own."""

    num_logits: ClassVar[int]
    """Tensors of logits that it needs, the student's included."""

    def given(self, rows: slice, out_TV: Tensor | None) -> Tensor:
        """What tokens are compared with; logits are written into `out_TV`."""
        ...

    def values_T(self, logits_TV: Tensor, given: Tensor) -> Tensor:
        """Take losses, and leave in `logits_TV`, float32, their gradients by it."""
        ...


@dataclass(frozen=True, eq=False)
class _CrossEntropy:
    targets_T: Tensor
    num_logits: ClassVar[int] = 1

    def given(self, rows: slice, out_TV: Tensor | None) -> Tensor:
        del out_TV
        return self.targets_T[rows, None]

    def values_T(self, logits_TV: Tensor, given: Tensor) -> Tensor:
        own_TV = functional.log_softmax(logits_TV, dim=-1)
        loss_T = -own_TV.gather(1, given)[:, 0]
        torch.exp(own_TV, out=logits_TV)
        logits_TV.scatter_add_(1, given, -torch.ones_like(loss_T)[:, None])
        return loss_T


@dataclass(frozen=True, eq=False)
class _Divergence:
    teacher: _OutputLayer
    temperature: float
    num_logits: ClassVar[int] = 2

    def given(self, rows: slice, out_TV: Tensor | None) -> Tensor:
        return self.teacher.logits_TV(rows, out_TV)

    def values_T(self, logits_TV: Tensor, given: Tensor) -> Tensor:
        other_TV = given.float()
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
    Products are of many tokens at a time, what lies between them of few.
    """
    num_tokens, vocab_size = len(layer.hidden_TD), len(layer.weight_VD)
    losses_T = torch.zeros(num_tokens, device=layer.hidden_TD.device)
    of_hidden_TD = torch.empty_like(layer.hidden_TD) if wanted[0] else None
    of_weight_VD: Tensor | None = None
    of_bias_V = losses_T.new_zeros(vocab_size) if wanted[2] else None
    num_rows, num_cached = _rows_at_a_time(layer)
    own_TV, *others = (
        layer.hidden_TD.new_empty(min(num_rows, num_tokens), vocab_size)
        for _ in range(loss.num_logits)
    )
    with torch.autocast(layer.hidden_TD.device.type, enabled=False):
        for start in range(0, num_tokens, num_rows):
            rows = slice(start, min(start + num_rows, num_tokens))
            chunk_TV = layer.logits_TV(rows, own_TV[: rows.stop - start])
            given = loss.given(rows, others[0][: rows.stop - start] if others else None)
            for first in range(0, len(chunk_TV), num_cached):
                part = slice(first, first + num_cached)
                logits_TV = chunk_TV[part].float()
                part_T = slice(start + first, start + first + len(logits_TV))
                losses_T[part_T] = loss.values_T(logits_TV, given[part])
                if weight_T is not None:
                    logits_TV.mul_(weight_T[part_T, None])
                if of_bias_V is not None:
                    of_bias_V += logits_TV.sum(dim=0)
                if any(wanted) and logits_TV.dtype is not layer.dtype:
                    chunk_TV[part] = logits_TV
            if of_hidden_TD is not None:
                torch.mm(chunk_TV, layer.weight_VD, out=of_hidden_TD[rows])
            if wanted[1]:
                own_VD = chunk_TV.T @ layer.hidden_TD[rows]
                of_weight_VD = own_VD.float() if of_weight_VD is None else of_weight_VD.add_(own_VD)
    if wanted[1] and of_weight_VD is None:
        of_weight_VD = torch.zeros_like(layer.weight_VD, dtype=torch.float32)
    return losses_T, [of_hidden_TD, of_weight_VD, of_bias_V]


def _rows_at_a_time(layer: _OutputLayer) -> tuple[int, int]:
    """How many tokens' logits are made at a time, and how many of these are compared at a time.

    Those of a wide layer are so many at least that the gradient of its weights, to which each
    product adds, is read and written seldom. On a CPU few are compared: an operator of many would
    find nothing in the cache of what the one before it wrote.
    """
    vocab_size, num_tokens = len(layer.weight_VD), len(layer.hidden_TD)
    row_bytes = vocab_size * torch.float32.itemsize
    held_bytes = 2 * vocab_size * layer.dtype.itemsize
    on_cpu = layer.hidden_TD.device.type == "cpu"
    most_bytes = max(MAX_BYTES, _LAYERS * layer.weight_VD.numel() * torch.float32.itemsize)
    num_rows = max(1, most_bytes // (held_bytes if on_cpu else held_bytes + _TENSORS * row_bytes))
    num_chunks = max(1, -(-num_tokens // num_rows))
    num_rows = max(1, -(-num_tokens // num_chunks))
    return num_rows, max(1, CACHED_BYTES // row_bytes) if on_cpu else num_rows
