"""The blocks of a decoder of the Llama kind as one native object, with a cache of keys and values.

For architectures whose block is norm, attention with rotated queries and keys, norm, gated
feed-forward network: Llama (SmolLM is one), Mistral, Qwen2, Qwen3. A call is one of C++, from
embeddings to the last norm, and of a few tokens (a step of `generate`) one in which threads go
through the layers together.

Shapes: B batch, L new tokens, D model, T = B * L tokens, K active experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.families import find_stacks
from moe_dist.conversion.family_rows import FamilySpec
from moe_dist.inference.backends.decoder_call import Past, forward_of
from moe_dist.inference.backends.native_blocks import (
    PRECISIONS,
    FeedForward,
    NativeBlocks,
    NativeGate,
    UnsuitedError,
    check_attention,
    check_is_its_own,
    check_widths,
    choice,
    is_known_class,
    read_feed_forward,
    read_linear,
    refuse_what_is_not_kept,
)
from moe_dist.inference.backends.native_linear import NativeLinear
from moe_dist.moe.gates import TokenGate

LLAMA_KIND = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose blocks are known, by their model type."""
_GATES = (TokenGate,)


class NativeDecoder(NativeBlocks):
    """In the place of all blocks of a decoder and the norm after them.

    Args:
        decoder: made in C++, with all weights.
        routers: of the layers; None where a layer routes nothing.
        width: of a head.
    """

    def __init__(self, decoder: Any, routers: list[nn.Module | None], width: int) -> None:
        super().__init__(routers, gates=_GATES)
        self._decoder = decoder
        self.width = width

    def forward(self, hidden_BLD: Tensor, past: Past) -> Tensor:
        """Apply all blocks and the norm."""
        self.check_input(hidden_BLD)
        if self.is_one_call:
            ids, weights = self.chosen_before(hidden_BLD)
            out: Tensor = self._decoder.forward(hidden_BLD, *past.arguments(), ids, weights)
            return out
        now = hidden_BLD
        for index, router in enumerate(self.routers):
            now, normed = self._decoder.attention_half(index, now, *past.arguments())
            ids_TK, weights_TK = None, None
            if not isinstance(router, nn.Identity):
                ids_TK, weights_TK = choice(router, normed)
            now = self._decoder.feed_forward_half(index, now, normed, ids_TK, weights_TK)
        normed_BLD: Tensor = self._decoder.last_norm(now, hidden_BLD)
        return normed_BLD


def install_native_decoder(model: Any, family: FamilySpec, precision: str) -> None:
    """Put a `NativeDecoder` in the place of a model's blocks, or raise an UnsuitedError.

    The head of a language model is packed, too.

    Args:
        model: a copy that is to answer only.
        family: its own, one of `LLAMA_KIND`.
        precision: one of `PRECISIONS`.
    """
    bases: list[Any] = [base for base, _ in find_stacks(model, family)]
    contents = [
        [_read(block, family) for block in base.layers[: base.config.num_hidden_layers]]
        for base in bases
    ]
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
        base.forward = forward_of(base, native, native.width, precision, len(own))
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
    for module in (base, base.norm, rotary):
        if not is_known_class(module):
            raise UnsuitedError(f"it has a {type(module).__name__}, which is not its family's")
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
        biases = [
            weight_OI.new_zeros(len(weight_OI)) if bias is None else bias
            for weight_OI, bias in (query, key, value)
        ]
        has_biases = any(bias is not None for _, bias in (query, key, value))
        networks, router = content.feed_forward.networks, content.feed_forward.router
        gate = NativeGate.of(router, _GATES)
        decoder.add_layer(
            torch.cat([query[0], key[0], value[0]]),
            torch.cat(biases) if has_biases else None,
            *out,
            [None if norm is None else norm.weight for norm in content.norms],
            [0.0 if norm is None else norm.variance_epsilon for norm in content.norms],
            *([one.w_gate for one in networks], [one.b_gate for one in networks]),
            *([one.w_in for one in networks], [one.b_in for one in networks]),
            *([one.w_out for one in networks], [one.b_out for one in networks]),
            bool(content.feed_forward.shared),
            *(gate.weight, gate.top_k, gate.weighs),
            content.window,
        )
    return decoder


def _pack_head(model: Any, precision: str) -> None:
    for name, child in model.named_children():
        head: Any = child
        is_head = child is model.get_output_embeddings() and type(child) is nn.Linear
        if is_head and not head.in_features % 4:
            setattr(model, name, NativeLinear(head.weight, head.bias, precision))
