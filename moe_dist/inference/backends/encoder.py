"""The blocks of a BERT-like encoder as one native object: packed weights, one call for all.

For architectures whose block is attention, norm, feed-forward network, norm, with nothing that
tells places apart in attention: BERT, RoBERTa and its kin, ELECTRA, DistilBERT. Others, and
machines that cannot, keep their own blocks.

Shapes: D model, F neurons, K active experts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.conversion.families import find_stacks, known_family
from moe_dist.conversion.family_rows import FamilySpec
from moe_dist.errors import ConversionError
from moe_dist.inference.backends.answers_only import AnswersOnly
from moe_dist.inference.backends.native import load_operators
from moe_dist.inference.backends.routed_ffn import (
    native_activation,
    takes_the_best,
)
from moe_dist.moe.experts import Experts
from moe_dist.moe.gates import TokenGate
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing import current_context

PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 2}
"""Numbers that encoder.cpp knows them by."""


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


class NativeBlocks(AnswersOnly):
    """In the place of all blocks of an encoder, as one.

    Args:
        encoder: made in C++, with all weights.
        routers: of the layers; None where a layer routes nothing.

    Attributes:
        is_one_call: whether the native code routes by itself, so that no router is called.
    """

    def __init__(self, encoder: Any, routers: list[nn.Module | None]) -> None:
        super().__init__()
        self._encoder = encoder
        self.routers = nn.ModuleList(nn.Identity() if r is None else r for r in routers)
        self.is_one_call = all(r is None or takes_the_best(r) for r in routers)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Apply all blocks, as the model applies them one by one."""
        self.check_input(hidden)
        if self.is_one_call:
            out: Tensor = self._encoder.forward(hidden, attention_mask)
            return out
        now = hidden
        for index, router in enumerate(self.routers):
            now = self._encoder.attention_half(index, now, attention_mask)
            ids_TK, weights_TK = None, None
            if not isinstance(router, nn.Identity):
                routing = router(now.reshape(-1, now.shape[-1]), current_context())
                ids_TK = routing.expert_ids
                weights_TK = None if routing.unit_weights else routing.expert_weights
            now = self._encoder.feed_forward_half(index, now, ids_TK, weights_TK)
        return now.to(hidden.dtype)


def install_native_blocks(model: Any, precision: str) -> str:
    """Put `NativeBlocks` in the place of a model's blocks, if that can be; else say why not.

    Args:
        model: a copy that is to answer only.
        precision: one of `PRECISIONS`.

    Returns:
        Nothing where it was done, else the reason.
    """
    family = known_family(model)
    if family is None or family.model_type not in BLOCKS:
        return f"only encoders of the BERT kind have it ({', '.join(BLOCKS)})"
    try:
        stacks = [
            (blocks, [_read(block, BLOCKS[family.model_type], family) for block in blocks])
            for blocks in _lists_of_blocks(model, family)
        ]
        _check_attention(model.config)
    except _Unsuited as reason:
        return str(reason)
    if not stacks:
        return "the model's blocks are not its family's own"
    if not load_operators() or not torch.ops.moe_dist.multiplies(PRECISIONS[precision]):
        return f"there is no native product in {precision} here"
    for blocks, contents in stacks:
        encoder = _make_encoder(contents, model.config.num_attention_heads, PRECISIONS[precision])
        del blocks[:]
        blocks.append(NativeBlocks(encoder, [content.router for content in contents]))
    for base, _ in find_stacks(model, family):
        base.register_forward_pre_hook(_refuse_what_is_not_kept, with_kwargs=True)
    return ""


class _Unsuited(Exception):
    """Why a model keeps its own blocks."""


@dataclass(frozen=True)
class _Network:
    """A feed-forward network: (F, D), (F,), (D, F), (D,)."""

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None

    def rounded(self) -> _Network:
        """Fill up with neurons that give nothing: products read four inputs at once."""
        missing = -self.w_in.shape[0] % 4
        b_in = self.b_in if self.b_in is None else F.pad(self.b_in, (0, missing))
        w_in, w_out = F.pad(self.w_in, (0, 0, 0, missing)), F.pad(self.w_out, (0, missing))
        return _Network(w_in, b_in, w_out, self.b_out)


@dataclass(frozen=True)
class _Content:
    """What the native encoder needs of a block."""

    linears: dict[str, tuple[Tensor, Tensor | None]]
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    experts: list[_Network]
    shared: list[_Network]
    router: nn.Module | None
    activation: int


def _check_attention(config: Any) -> None:
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise _Unsuited("the model is a decoder")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise _Unsuited(f"its attention is {config._attn_implementation!r}")


def _lists_of_blocks(model: nn.Module, family: FamilySpec) -> list[nn.ModuleList]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(type(block).__name__ in family.blocks for block in module)
    ]


def _read(block: nn.Module, names: BlockNames, family: FamilySpec) -> _Content:
    for module in block.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # Transformers leaves its own where hidden states were once asked for.
        own = [hook for hook in hooks if "output_capturing_hook" not in _name(hook)]
        if own or "forward" in vars(module):
            raise _Unsuited("a block has hooks, or a forward of its own")
        if type(module).__module__.partition(".")[0] not in ("torch", "transformers", "moe_dist"):
            raise _Unsuited(f"a block holds a {type(module).__name__}, which is not its family's")
    roles = ("query", "key", "value", "attention_out")
    linears = {role: _linear(block, getattr(names, role)) for role in roles}
    norms = (_norm(block, names.attention_norm), _norm(block, names.out_norm))
    layer = next((module for module in block.modules() if isinstance(module, MoELayer)), None)
    if layer is None:
        dense = _Network(*_linear(block, family.linear_in), *_linear(block, family.linear_out))
        activation: Any = block.get_submodule(family.activation)
        experts, shared, router = [dense.rounded()], [], None
    else:
        activation, router = layer.experts.activation, layer.router
        experts = _networks(layer.experts)
        shared = [] if layer.shared is None else _networks(layer.shared)
    number = native_activation(activation)
    if number is None:
        raise _Unsuited("its activation is not known there")
    widths = [weight_OI.shape[1] for weight_OI, _ in linears.values()]
    if any(width % 4 for width in widths):
        raise _Unsuited(
            f"widths of {', '.join(map(str, sorted(set(widths))))} are no multiples of 4"
        )
    return _Content(linears, norms, experts, shared, router, number)


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", ""))


def _linear(block: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    linear: Any = block.get_submodule(path)
    if type(linear) is not nn.Linear:
        raise _Unsuited(f"{path} is no plain linear layer")
    return linear.weight, linear.bias


def _norm(block: nn.Module, path: str) -> nn.LayerNorm:
    norm: Any = block.get_submodule(path)
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise _Unsuited(f"{path} is no plain norm")
    return norm


def _networks(experts: Experts) -> list[_Network]:
    if experts.w_in is None or experts.w_out is None or experts.w_gate is not None:
        raise _Unsuited("its experts are gated, or have no neurons")
    none = [None] * experts.num_experts
    b_in = none if experts.b_in is None else experts.b_in
    b_out = none if experts.b_out is None else experts.b_out
    parts = zip(experts.w_in, b_in, experts.w_out, b_out, strict=True)
    return [_Network(*part).rounded() for part in parts]


def _make_encoder(contents: list[_Content], num_heads: int, precision: int) -> Any:
    encoder = torch.classes.moe_dist.Encoder(num_heads, contents[0].activation, precision)
    for content in contents:
        # Weights may have been cast already; they are packed from float32.
        query, key, value, out = (content.linears[role] for role in content.linears)
        width = query[0].shape[0]
        biases = [torch.zeros(width) if bias is None else bias for _, bias in (query, key, value)]
        networks = [*content.experts, *content.shared]
        first, last = content.norms
        router = content.router
        is_native = router is not None and takes_the_best(router)
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
            bool(content.shared),
            cast(TokenGate, router).gate.weight if is_native else None,
        )
    return encoder


def _refuse_what_is_not_kept(base: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    for name in ("output_hidden_states", "output_attentions"):
        asked = kwargs.get(name)
        if getattr(base.config, name, False) if asked is None else asked:
            raise ConversionError(
                f"an encoder in its lean form does not keep what {name} asks for",
                remedy="use an eager form",
            )
