"""The blocks of a BERT-like encoder as one native object: packed weights, one call for all.

For architectures whose block is attention, norm, feed-forward network, norm, with nothing that
tells places apart in attention: BERT, RoBERTa and its kin, ELECTRA, DistilBERT. Others, and
machines that cannot, keep their own blocks.

Shapes: D model, F neurons, K active experts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.families import find_stacks
from moe_dist.conversion.family_rows import FamilySpec
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
    lists_of_blocks,
    read_feed_forward,
    read_linear,
    refuse_what_is_not_kept,
)
from moe_dist.moe.gates import SentenceGate, TokenGate, sentence_mask
from moe_dist.moe.routing import current_context


@dataclass(frozen=True)
class BlockNames:
    """Where a block keeps what surrounds its feed-forward network."""

    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    out_norm: str


_BERT = BlockNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    out_norm="output.LayerNorm",
)
_DISTILBERT = BlockNames(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_out="attention.out_lin",
    attention_norm="sa_layer_norm",
    out_norm="output_layer_norm",
)
BLOCKS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": _DISTILBERT,
}
"""Families whose blocks are known, by their model type."""
_GATES = (TokenGate, SentenceGate)


class NativeEncoder(NativeBlocks):
    """In the place of all blocks of an encoder.

    Args:
        encoder: made in C++, with all weights.
        routers: of the layers; None where a layer routes nothing.
    """

    def __init__(self, encoder: Any, routers: list[nn.Module | None]) -> None:
        super().__init__(routers, gates=_GATES)
        self._encoder = encoder
        self._reads_texts = any(type(router) is SentenceGate for router in routers)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Apply all blocks, as the model applies them one by one."""
        self.check_input(hidden)
        if self.is_one_call:
            shares_BL = _shares(hidden) if self._reads_texts else None
            chosen = self.chosen_before(hidden)
            out: Tensor = self._encoder.forward(hidden, attention_mask, shares_BL, *chosen)
            return out
        now = hidden
        for index, router in enumerate(self.routers):
            now = self._encoder.attention_half(index, now, attention_mask)
            ids_TK, weights_TK = None, None
            if not isinstance(router, nn.Identity):
                ids_TK, weights_TK = choice(router, now)
            now = self._encoder.feed_forward_half(index, now, ids_TK, weights_TK)
        return now.to(hidden.dtype)


def _shares(hidden_BLD: Tensor) -> Tensor:
    """Tell each token's part in the mean of its text: (B, L) float32, 0 of padding."""
    mask_BL = sentence_mask(hidden_BLD.flatten(0, 1), current_context()).float()
    return mask_BL / mask_BL.sum(1, keepdim=True).clamp(min=1)


def install_native_encoder(model: Any, family: FamilySpec, precision: str) -> None:
    """Put a `NativeEncoder` in the place of a model's blocks, or raise an UnsuitedError.

    Args:
        model: a copy that is to answer only.
        family: its own, one of `BLOCKS`.
        precision: one of `PRECISIONS`.
    """
    for blocks, contents in _read_stacks(model, family):
        encoder = _make_encoder(contents, model.config.num_attention_heads, PRECISIONS[precision])
        del blocks[:]
        blocks.append(NativeEncoder(encoder, [content.feed_forward.router for content in contents]))
    for base, _ in find_stacks(model, family):
        base.register_forward_pre_hook(refuse_what_is_not_kept, with_kwargs=True)


def install_native_layers(model: Any, family: FamilySpec, precision: str) -> None:
    """Give each block of a dense encoder a native forward of its own, or raise an UnsuitedError.

    The blocks stay, without weights, so that what lies between them can still be asked for.

    Args:
        model: a frozen copy.
        family: its own, one of `BLOCKS`.
        precision: one of `PRECISIONS`.
    """
    stacks = _read_stacks(model, family)
    contents = [content for _, contents in stacks for content in contents]
    if any(content.feed_forward.router is not None for content in contents):
        raise UnsuitedError("it has experts")
    for blocks, contents in stacks:
        for block, content in zip(blocks, contents, strict=True):
            heads = model.config.num_attention_heads
            native = NativeEncoder(_make_encoder([content], heads, PRECISIONS[precision]), [None])
            block._modules.clear()
            block.forward = native.forward


def _read_stacks(model: Any, family: FamilySpec) -> list[tuple[nn.ModuleList, list[_Content]]]:
    """Read all blocks of a model, or raise an UnsuitedError."""
    stacks = [
        (
            blocks,
            [_read(block, BLOCKS[family.model_type], family, model.config) for block in blocks],
        )
        for blocks in lists_of_blocks(model, family)
    ]
    if getattr(model.config, "is_decoder", False) or getattr(
        model.config, "add_cross_attention", False
    ):
        raise UnsuitedError("the model is a decoder")
    check_attention(model.config)
    if not stacks:
        raise UnsuitedError("the model's blocks are not its family's own")
    return stacks


@dataclass(frozen=True)
class _Content:
    """What the native encoder needs of a block."""

    linears: dict[str, tuple[Tensor, Tensor | None]]
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    feed_forward: FeedForward


def _read(block: nn.Module, names: BlockNames, family: FamilySpec, config: Any) -> _Content:
    check_is_its_own(block)
    _check_heads(block.get_submodule(names.query.rpartition(".")[0]), config)
    roles = ("query", "key", "value", "attention_out")
    linears = {role: read_linear(block, getattr(names, role)) for role in roles}
    norms = (_norm(block, names.attention_norm), _norm(block, names.out_norm))
    feed_forward = read_feed_forward(block, family, is_gated=False)
    check_widths([weight_OI for weight_OI, _ in linears.values()])
    return _Content(linears, norms, feed_forward)


def _check_heads(attention: Any, config: Any) -> None:
    """See that heads are as many as the configuration says, and scores scaled by their width."""
    name = "num_attention_heads" if hasattr(attention, "num_attention_heads") else "n_heads"
    if getattr(attention, name) != config.num_attention_heads:
        raise UnsuitedError("a block has other heads than its configuration says")
    usual = attention.attention_head_size**-0.5
    if abs(getattr(attention, "scaling", usual) - usual) > 1e-6 * usual:
        raise UnsuitedError("a block scales its scores in another way than by its heads' width")


def _norm(block: nn.Module, path: str) -> nn.LayerNorm:
    norm: Any = block.get_submodule(path)
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise UnsuitedError(f"{path} is no plain norm")
    return norm


def _make_encoder(contents: list[_Content], num_heads: int, precision: int) -> Any:
    activation = contents[0].feed_forward.activation
    encoder = torch.classes.moe_dist.Encoder(num_heads, activation, precision)
    for content in contents:
        # Weights may have been cast already; they are packed from float32.
        query, key, value, out = (content.linears[role] for role in content.linears)
        width = query[0].shape[0]
        biases = [torch.zeros(width) if bias is None else bias for _, bias in (query, key, value)]
        networks = content.feed_forward.networks
        first, last = content.norms
        router = content.feed_forward.router
        gate = NativeGate.of(router, _GATES)
        encoder.add_layer(
            torch.cat([query[0], key[0], value[0]]),
            torch.cat(biases),
            *out,
            [first.weight, first.bias, last.weight, last.bias],
            *(first.eps, last.eps),
            [network.w_in for network in networks],
            [network.b_in for network in networks],
            [network.w_out for network in networks],
            [network.b_out for network in networks],
            bool(content.feed_forward.shared),
            *(gate.weight, gate.top_k, gate.weighs, type(router) is SentenceGate),
        )
    return encoder
