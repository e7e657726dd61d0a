"""transformers' own cache, with room: native code writes behind what is there, and copies nothing.

Shapes: B batch, H heads of keys, L tokens, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from moe_dist.errors import ConversionError

MIN_ROOM = 64
"""Tokens that a buffer has room for at least."""


class _Room:
    """Some tokens, in a buffer that may have room for more.

    What was once given away is never written again: a cache that is cut or put in another order
    gets a buffer of its own.
    """

    def __init__(self, tokens_BHLD: Tensor, dtype: torch.dtype, length: int) -> None:
        batch, heads, self.length, width = tokens_BHLD.shape
        room = max(MIN_ROOM, length + length // 2)
        self.buffer = torch.empty(batch, heads, room, width, dtype=dtype)
        self.buffer[:, :, : self.length] = tokens_BHLD

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, :, : self.length]


class RoomyLayer(DynamicLayer):
    """A layer of a cache for native code; to all others an ordinary one.

    A window of the layer is applied where attention is computed, so all tokens are kept.
    """

    def __init__(self) -> None:
        self._rooms: dict[str, _Room | None] = {}
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """(B, H, L, D)."""
        return self._tokens("keys")

    @keys.setter
    def keys(self, tokens_BHLD: Tensor | None) -> None:
        self._keep("keys", tokens_BHLD)

    @property
    def values(self) -> Tensor | None:
        """(B, H, L, D)."""
        return self._tokens("values")

    @values.setter
    def values(self, tokens_BHLD: Tensor | None) -> None:
        self._keep("values", tokens_BHLD)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens, for what updates it as an ordinary layer."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def get_seq_length(self) -> int:
        """Give L."""
        room = self._rooms["keys"]
        return 0 if room is None else room.length

    def buffers(self, like_BHLD: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Give buffers with room for so many tokens, of the batch and type of an empty tensor."""
        found = []
        for name, room in self._rooms.items():
            is_fit = room is not None and room.buffer.dtype is like_BHLD.dtype
            if room is None or not is_fit or room.buffer.shape[2] < length:
                before = like_BHLD if room is None else room.tokens
                room = _Room(before, like_BHLD.dtype, length)
                self._rooms[name] = room
            found.append(room.buffer)
        self.is_initialized, self.dtype, self.device = True, like_BHLD.dtype, like_BHLD.device
        return found[0], found[1]

    def hold(self, length: int) -> None:
        """Note how many tokens lie in the buffers now."""
        for room in self._rooms.values():
            assert room is not None
            room.length = length

    def _tokens(self, name: str) -> Tensor | None:
        room = self._rooms[name]
        return None if room is None else room.tokens

    def _keep(self, name: str, tokens: Tensor | None) -> None:
        if tokens is not None and tokens.dim() != 4:
            tokens = None  # the base class begins with a tensor of nothing
        self._rooms[name] = None if tokens is None else _Room(tokens, tokens.dtype, tokens.shape[2])


def open_cache(cache: Any, num_layers: int) -> list[RoomyLayer]:
    """Give the layers of a cache as native code takes them; what it holds stays there.

    Another kind of cache than a plain `DynamicCache`, one of windows that has dropped tokens, or
    one whose layers hold different numbers of tokens, is a ConversionError.
    """
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        raise ConversionError(
            f"a decoder in its lean form takes no {_called(cache)}",
            remedy="leave out cache_implementation and past_key_values, or pass a DynamicCache()",
        )
    layers: list[Any] = cache.layers
    if len(layers) > num_layers:
        raise ConversionError(
            f"the cache has {len(layers)} layers, and the model {num_layers}",
            remedy="pass a cache of this model",
        )
    own = [_converted(layer) for layer in layers]
    own += [RoomyLayer() for _ in range(num_layers - len(own))]
    lengths = sorted({layer.get_seq_length() for layer in own})
    if len(lengths) > 1:
        raise ConversionError(
            f"layers of the cache hold different numbers of tokens: {', '.join(map(str, lengths))}",
            remedy="pass a cache that this model filled, and cut all its layers alike",
        )
    layers[:] = own
    return own


def _converted(layer: Any) -> RoomyLayer:
    if type(layer) is RoomyLayer:
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ConversionError(
            f"a decoder in its lean form takes no cache with a {type(layer).__name__}",
            remedy="pass a DynamicCache()",
        )
    own = RoomyLayer()
    if layer.is_initialized and layer.keys.numel():
        if layer.keys.shape[2] != layer.get_seq_length():
            raise ConversionError(
                "the cache keeps a window of tokens alone, and a decoder in its lean form needs "
                "all of them",
                remedy="begin with an empty cache",
            )
        own.keys, own.values = layer.keys, layer.values
        own.is_initialized = True
    return own


def _called(cache: Any) -> str:
    kind = type(cache).__name__
    return f"{kind} that is offloaded" if isinstance(cache, DynamicCache) else kind
