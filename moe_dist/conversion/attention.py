"""Reading queries and keys out of an unforked forward, whatever computes the attention.

Fused attention never forms its scores, and transformers hands out probabilities only. So hooks on
the query and key layers keep what these give, and losses compute the scores they need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_dist.conversion.families import find_attention


@dataclass(frozen=True)
class AttentionInputs:
    """What one attention layer compares.

    Args:
        query_BSD: queries of all heads side by side.
        key_BSD: keys, likewise.
        num_heads: attention heads.
    """

    query_BSD: Tensor
    key_BSD: Tensor
    num_heads: int


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionInputs]]:
    """Keep queries and keys of forward passes inside the block: an entry for each layer, in order.

    A model whose family is not known here is a ConversionError.
    """
    num_heads = num_attention_heads(model)
    recorded: list[AttentionInputs] = []
    queries: list[Tensor] = []

    def after_query(module: nn.Module, args: Any, query_BSD: Tensor) -> None:
        queries.append(query_BSD)

    def after_key(module: nn.Module, args: Any, key_BSD: Tensor) -> None:
        recorded.append(AttentionInputs(queries.pop(), key_BSD, num_heads))

    handles = []
    for query, key in find_attention(model):
        handles.append(query.register_forward_hook(after_query))
        handles.append(key.register_forward_hook(after_key))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def num_attention_heads(model: nn.Module) -> int:
    """Say how many heads each layer has whose scores can be read; else a ConversionError."""
    find_attention(model)
    config: Any = model.config
    return int(config.num_attention_heads)
