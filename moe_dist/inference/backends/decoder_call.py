"""What the stack of a native decoder does in place of its own forward: positions, cache, masks.

Shapes: B batch, L new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from moe_dist.errors import ConversionError
from moe_dist.inference.backends.key_value_cache import RoomyLayer, open_cache

_FIXED_PLACES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles depend on a position alone."""
_MIN_PLACES = 256


@dataclass(frozen=True)
class Past:
    """What a call knows beside hidden states.

    Attributes:
        cos: (places, width of a head) of rows that `positions` names.
        sin: likewise.
        positions: (B, L), or (1, L) for all.
        mask: (B, tokens), of four dimensions, or None.
        keys: of each layer a buffer (B, heads of keys, room, width); none if nothing is kept.
        values: likewise.
        length: tokens that are in the buffers.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    mask: Tensor | None
    keys: list[Tensor]
    values: list[Tensor]
    length: int

    def arguments(self) -> tuple[Any, ...]:
        """List it as C++ takes it."""
        places = (self.cos, self.sin, self.positions)
        return (*places, self.mask, self.keys, self.values, self.length)


class _Places:
    """Angles of positions, from the model's own rotary module.

    Args:
        rotary: gives cosines and sines of positions.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._is_fixed = getattr(rotary, "rope_type", "") in _FIXED_PLACES
        self._tables: tuple[Tensor, Tensor] | None = None

    def look_up(self, positions: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Find cosines and sines of positions.

        Args:
            positions: (B, L), or (1, L) for all.
            num_tokens: of a text until now; positions beyond them get no table of all before them.

        Returns:
            Cosines and sines (places, width), and the rows of them that are meant (B, L).
        """
        most = int(positions.max()) + 1 if positions.numel() else 0
        tables = self._tables if self._is_fixed else None
        if tables is not None and 0 < most <= len(tables[0]):
            return *tables, positions
        if not self._is_fixed or not 0 < most <= num_tokens:
            rows = torch.arange(positions.numel()).view(positions.shape)
            return *self._compute(positions), rows
        number = max(_MIN_PLACES, 1 << (most - 1).bit_length())
        self._tables = self._compute(torch.arange(number).unsqueeze(0))
        return *self._tables, positions

    def _compute(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        # The empty tensor says of which type they are to be.
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), positions)
        width = cos.shape[-1]
        return cos.reshape(-1, width).contiguous(), sin.reshape(-1, width).contiguous()


def forward_of(
    base: Any,
    native: Callable[[Tensor, Past], Tensor],
    width: int,
    precision: str,
    num_layers: int,
) -> Callable[..., Any]:
    """Make what a stack does in place of its own forward, with the same arguments.

    Args:
        base: the stack, which keeps its embeddings and rotary positions.
        native: all blocks and the last norm.
        width: of a head.
        precision: of the blocks, which says of which type the cache is.
        num_layers: of the cache.

    Returns:
        The function.
    """
    config: Any = base.config
    places = _Places(base.rotary_emb)
    empty = torch.empty(0, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        hidden = base.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        layers: list[RoomyLayer] = [] if cache is None else open_cache(cache, num_layers)
        length = layers[0].get_seq_length() if layers else 0
        batch, new = hidden.shape[:2]
        _check_call(attention_mask, position_ids, kwargs, (batch, length, new), cache)
        if position_ids is None:
            position_ids = torch.arange(length, length + new).unsqueeze(0)
        position_ids = position_ids.long()
        like = empty.new_empty(batch, config.num_key_value_heads, 0, width)
        pairs = [layer.buffers(like, length + new) for layer in layers]
        keys, values = [key for key, _ in pairs], [value for _, value in pairs]
        cos, sin, rows = places.look_up(position_ids, length + new)
        past = Past(cos, sin, rows, attention_mask, keys, values, length)
        out = BaseModelOutputWithPast(native(hidden, past), past_key_values=cache)
        for layer in layers:
            layer.hold(length + new)
        as_dict = kwargs.get("return_dict", getattr(config, "return_dict", True))
        return out.to_tuple() if as_dict is False else out

    return forward


def _check_call(
    mask: Any,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    sizes: tuple[int, int, int],
    cache: object,
) -> None:
    """Refuse what native attention would read otherwise than the model's own."""
    batch, length, new = sizes
    if kwargs.get("is_causal") is False:
        raise _refusal("lets tokens see later ones", "leave out is_causal")
    if position_ids is not None and bool((position_ids < 0).any()):
        raise _refusal("takes no positions below 0", "count them from 0")
    if mask is not None:
        is_tensor = isinstance(mask, Tensor)
        if not is_tensor or mask.dim() not in (2, 4):
            shape = tuple(mask.shape) if is_tensor else type(mask).__name__
            raise _refusal(f"takes no attention mask of {shape}", "pass one of (texts, tokens)")
        if mask.dim() == 2 and mask.shape != (batch, length + new):
            raise _refusal(
                f"takes no attention mask of {tuple(mask.shape)} for {batch} texts of "
                f"{length + new} tokens, those in the cache among them",
                "pass a mask of all of them",
            )
        return
    # The model's own forward takes these for several texts in a row.
    if position_ids is not None and cache is None and bool((position_ids.diff(dim=1) != 1).any()):
        raise _refusal("keeps no texts apart that share a row", "give each text its own row")


def _refusal(what: str, remedy: str) -> ConversionError:
    return ConversionError(
        f"a decoder in its lean form {what}", remedy=f"{remedy}, or use an eager form"
    )
