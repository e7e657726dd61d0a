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
    modules = find_attention(model)
    recorded: list[AttentionInputs] = []
    queries: dict[int, Tensor] = {}
    handles = []
    for attention in modules:
        handles += _hooks(attention, queries, recorded)
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def num_attention_heads(model: nn.Module) -> int:
    """Say how many heads each layer of a BERT has; other families are a ConversionError."""
    first: Any = find_attention(model)[0]
    return int(first.num_attention_heads)


def _hooks(
    attention: Any, queries: dict[int, Tensor], recorded: list[AttentionInputs]
) -> list[Any]:
    def after_query(module: nn.Module, args: Any, query_BSD: Tensor) -> None:
        queries[id(attention)] = query_BSD

    def after_key(module: nn.Module, args: Any, key_BSD: Tensor) -> None:
        query_BSD = queries.pop(id(attention))
        recorded.append(AttentionInputs(query_BSD, key_BSD, attention.num_attention_heads))

    return [
        attention.query.register_forward_hook(after_query),
        attention.key.register_forward_hook(after_key),
    ]
