"""The blocks of a decoder of the Llama kind as one native object, with a cache of keys and values.

For architectures whose block is norm, attention with rotated queries and keys, norm, gated
feed-forward network: Llama (SmolLM is one), Mistral, Qwen2, Qwen3. A call is one of C++, from
embeddings to the last norm, and of a few tokens (a step of `generate`) one in which threads go
through the layers together.

Shapes: B batch, L new tokens, D model, T = B * L tokens, K active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from moe_dist.conversion.families import find_stacks
from moe_dist.conversion.family_rows import FamilySpec
from moe_dist.errors import ConversionError
from moe_dist.inference.backends.key_value_cache import RoomyLayer, open_cache
from moe_dist.inference.backends.native_blocks import (
    PRECISIONS,
    FeedForward,
    NativeBlocks,
    UnsuitedError,
    check_attention,
    check_is_its_own,
    check_widths,
    read_feed_forward,
    read_linear,
    refuse_what_is_not_kept,
)
from moe_dist.inference.backends.native_linear import NativeLinear
from moe_dist.moe.gates import TokenGate
from moe_dist.moe.hash_router import HashRouter
from moe_dist.moe.routing import Routing, current_context
from moe_dist.moe.task_routers import TaskGate, TaskTable

LLAMA_KIND = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose blocks are known, by their model type."""
_BLIND_ROUTERS = (HashRouter, TaskTable, TaskGate)
"""What chooses without hidden states, so that all layers are asked before the first."""
_FIXED_PLACES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles depend on a position alone."""
_MIN_PLACES = 256


@dataclass(frozen=True)
class _Past:
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


class NativeDecoder(NativeBlocks):
    """In the place of all blocks of a decoder and the norm after them.

    Args:
        decoder: made in C++, with all weights.
        routers: of the layers; None where a layer routes nothing.
        width: of a head.
    """

    def __init__(self, decoder: Any, routers: list[nn.Module | None], width: int) -> None:
        known = (TokenGate, *_BLIND_ROUTERS)
        super().__init__(
            routers, is_one_call=all(router is None or type(router) in known for router in routers)
        )
        self._decoder = decoder
        self.width = width

    def forward(self, hidden_BLD: Tensor, past: _Past) -> Tensor:
        """Apply all blocks and the norm."""
        self.check_input(hidden_BLD)
        if self.is_one_call:
            ids, weights = self._chosen(hidden_BLD)
            out: Tensor = self._decoder.forward(hidden_BLD, *past.arguments(), ids, weights)
            return out
        now = hidden_BLD
        for index, router in enumerate(self.routers):
            now, normed = self._decoder.attention_half(index, now, *past.arguments())
            ids_TK, weights_TK = None, None
            if not isinstance(router, nn.Identity):
                ids_TK, weights_TK = _choice(router, normed)
            now = self._decoder.feed_forward_half(index, now, normed, ids_TK, weights_TK)
        normed_BLD: Tensor = self._decoder.last_norm(now, hidden_BLD)
        return normed_BLD

    def _chosen(self, hidden_BLD: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Ask the routers that read no hidden states; nothing where there are none."""
        if not any(isinstance(router, _BLIND_ROUTERS) for router in self.routers):
            return [], []
        pairs = [
            _choice(router, hidden_BLD) if isinstance(router, _BLIND_ROUTERS) else (None, None)
            for router in self.routers
        ]
        return [ids for ids, _ in pairs], [weights for _, weights in pairs]


def _choice(router: nn.Module, hidden_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
    routing: Routing = router(hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), current_context())
    return routing.expert_ids, None if routing.unit_weights else routing.expert_weights


def install_native_decoder(model: Any, family: FamilySpec, precision: str) -> None:
    """Put a `NativeDecoder` in the place of a model's blocks, or raise an UnsuitedError.

    The head of a language model is packed, too.

    Args:
        model: a copy that is to answer only.
        family: its own, one of `LLAMA_KIND`.
        precision: one of `PRECISIONS`.
    """
    bases: list[Any] = [base for base, _ in find_stacks(model, family)]
    contents = [[_read(block, family) for block in base.layers] for base in bases]
    if not bases or not all(contents):
        raise UnsuitedError("the model's blocks are not its family's own")
    for base in bases:
        check_attention(base.config)
        _check_stack(base)
    for base, own in zip(bases, contents, strict=True):
        native = NativeDecoder(
            _make_decoder(base, own, PRECISIONS[precision]),
            [content.feed_forward.router for content in own],
            base.layers[0].self_attn.head_dim,
        )
        base.layers = nn.ModuleList([native])
        base.norm = nn.Identity()
        base.forward = _forward_of(base, native, precision, len(own))
        base.register_forward_pre_hook(refuse_what_is_not_kept, with_kwargs=True)
    _pack_head(model, precision)


@dataclass(frozen=True)
class _Content:
    """What the native decoder needs of a block.

    Attributes:
        linears: of queries, keys, values, and after attention: weight and bias.
        norms: before attention, before the network, of queries, of keys; the last two may be None.
        feed_forward: the network.
        window: tokens that one sees; 0 is all before it.
    """

    linears: list[tuple[Tensor, Tensor | None]]
    norms: list[Any]
    feed_forward: FeedForward
    window: int


def _check_stack(base: Any) -> None:
    config = base.config
    if "forward" in vars(base):
        raise UnsuitedError("the model has a forward of its own")
    if getattr(config, "is_causal", True) is False:
        raise UnsuitedError("its tokens see later ones")
    _norm(base, "norm")
    rotary = base.rotary_emb
    if rotary._forward_hooks or rotary._forward_pre_hooks or "forward" in vars(rotary):
        raise UnsuitedError("its positions have hooks, or a forward of their own")
    if 2 * rotary.inv_freq.numel() != base.layers[0].self_attn.head_dim:
        raise UnsuitedError("not all of a head is rotated")


def _read(block: Any, family: FamilySpec) -> _Content:
    check_is_its_own(block)
    attention = block.self_attn
    roles = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = [read_linear(attention, role) for role in roles]
    norms = [_norm(block, "input_layernorm"), _norm(block, "post_attention_layernorm")]
    for name in ("q_norm", "k_norm"):
        norms.append(_norm(attention, name) if hasattr(attention, name) else None)
    feed_forward = read_feed_forward(block, family, is_gated=True)
    check_widths([weight_OI for weight_OI, _ in linears])
    # Mistral's stands in the configuration alone, Qwen's in the layers that have one.
    window = getattr(attention, "sliding_window", None)
    if family.model_type == "mistral":
        window = attention.config.sliding_window
    return _Content(linears, norms, feed_forward, window or 0)


def _norm(module: nn.Module, path: str) -> Any:
    norm: Any = module.get_submodule(path)
    if not type(norm).__name__.endswith("RMSNorm") or not hasattr(norm, "variance_epsilon"):
        raise UnsuitedError(f"{path} is no plain norm")
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        raise UnsuitedError(f"{path} has hooks, or a forward of its own")
    return norm


def _make_decoder(base: Any, contents: Sequence[_Content], precision: int) -> Any:
    attention = base.layers[0].self_attn
    decoder = torch.classes.moe_dist.Decoder(
        base.config.num_attention_heads,
        base.config.num_key_value_heads,
        attention.head_dim,
        float(attention.scaling),
        contents[0].feed_forward.activation,
        precision,
        base.norm.weight,
        base.norm.variance_epsilon,
    )
    for content in contents:
        query, key, value, out = content.linears
        biases = (query[1], key[1], value[1])
        has_biases = all(bias is not None for bias in biases)
        networks, router = content.feed_forward.networks, content.feed_forward.router
        gate = cast(TokenGate, router) if type(router) is TokenGate else None
        weighs = gate is not None and (gate.top_k > 1 or gate.gate_scale != "straight_through")
        decoder.add_layer(
            torch.cat([query[0], key[0], value[0]]),
            torch.cat(cast(list[Tensor], list(biases))) if has_biases else None,
            *out,
            [None if norm is None else norm.weight for norm in content.norms],
            [0.0 if norm is None else norm.variance_epsilon for norm in content.norms],
            *([one.w_gate for one in networks], [one.b_gate for one in networks]),
            *([one.w_in for one in networks], [one.b_in for one in networks]),
            *([one.w_out for one in networks], [one.b_out for one in networks]),
            bool(content.feed_forward.shared),
            None if gate is None else gate.gate.weight,
            1 if gate is None else gate.top_k,
            weighs,
            content.window,
        )
    return decoder


def _pack_head(model: Any, precision: str) -> None:
    for name, child in model.named_children():
        head: Any = child
        is_head = child is model.get_output_embeddings() and type(child) is nn.Linear
        if is_head and not head.in_features % 4:
            setattr(model, name, NativeLinear(head.weight, head.bias, precision))


class _Places:
    """Angles of positions, from the model's own rotary module.

    Args:
        rotary: gives cosines and sines of positions.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._is_fixed = getattr(rotary, "rope_type", "") in _FIXED_PLACES
        self._tables: tuple[Tensor, Tensor] | None = None

    def look_up(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give cosines and sines (places, width), and rows of them (B, L)."""
        if not self._is_fixed or not positions.numel():
            cos, sin = self._compute(positions)
            rows = torch.arange(positions.numel()).view(positions.shape)
            return cos, sin, rows
        most = int(positions.max()) + 1
        tables = self._tables
        if tables is None or len(tables[0]) < most:
            number = max(_MIN_PLACES, 1 << (most - 1).bit_length())
            tables = self._compute(torch.arange(number).unsqueeze(0))
            self._tables = tables
        return *tables, positions

    def _compute(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        # The empty tensor says of which type they are to be.
        cos, sin = self._rotary(torch.empty(0), positions)
        width = cos.shape[-1]
        return cos.reshape(-1, width).contiguous(), sin.reshape(-1, width).contiguous()


def _forward_of(
    base: Any, native: NativeDecoder, precision: str, num_layers: int
) -> Callable[..., Any]:
    """Make what a stack does in place of its own forward, with the same arguments."""
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
        like = empty.new_empty(batch, config.num_key_value_heads, 0, native.width)
        pairs = [layer.buffers(like, length + new) for layer in layers]
        keys, values = [key for key, _ in pairs], [value for _, value in pairs]
        cos, sin, rows = places.look_up(position_ids)
        past = _Past(cos, sin, rows, attention_mask, keys, values, length)
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
