"""The layer that makes logits over a vocabulary, and models without it.

All tokens' logits at once may be more than fits into memory; losses make them a few at a time.

Shapes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.losses.tokens import TokenScores

_BIAS = "final_logits_bias"
"""What BART adds to the logits after its output layer."""


def token_scores(model: Any, hidden_TD: Tensor) -> TokenScores:
    """Join what the output layer reads with its weights."""
    layer, bias_1V = _output_layer(model), getattr(model, _BIAS, None)
    bias_V = layer.bias if bias_1V is None else bias_1V[0]
    return TokenScores(hidden_TD, layer.weight, bias_V)


@contextmanager
def without_output_layer(model: nn.Module) -> Iterator[None]:
    """Let the output layer give back what it reads, so that no logits are made.

    Families whose forward does more with logits than to return them are not supported, but for
    BART's bias; a test sees to it for each of FAMILIES.
    """
    layer = _output_layer(model)
    own = layer.__dict__.get("forward")
    bias = model._buffers.get(_BIAS)
    layer.forward = _unchanged
    if bias is not None:
        model._buffers[_BIAS] = torch.zeros_like(bias[:, :1])
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own
        if bias is not None:
            model._buffers[_BIAS] = bias


def _output_layer(model: Any) -> Any:
    layer = model.get_output_embeddings()
    assert layer is not None, "a model that writes has an output layer"
    return layer


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
