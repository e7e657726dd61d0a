"""Finding the feed-forward networks of a model, and reading and replacing them by its family's row.

Scoring, conversion and the registered classes read models through this; `family_rows` has the
names.

Shapes: D model, F FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_dist.conversion.family_rows import FAMILIES, FamilySpec
from moe_dist.errors import ConversionError

__all__ = [
    "FAMILIES",
    "FFNSlot",
    "FFNWeights",
    "FamilySpec",
    "family_of",
    "find_attention",
    "find_slots",
    "find_stacks",
    "half_fault",
    "is_a",
    "known_family",
    "position_limit",
]


@dataclass(frozen=True)
class FFNWeights:
    """One FFN's weights, whatever the layout they are stored in.

    Args:
        w_in: (F, D), the first projection; in a gated FFN the one without activation.
        b_in: (F,) or None.
        w_gate: (F, D), the activated projection of a gated FFN, or None.
        b_gate: (F,) or None.
        w_out: (D, F).
        b_out: (D,) or None.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_out: Tensor
    b_out: Tensor | None


@dataclass(frozen=True)
class FFNSlot:
    """One FFN of a dense model.

    Args:
        index: its place among the model's FFNs; encoders come before decoders.
        name: dotted name of the module that holds it.
        block: that module.
        spec: the family it belongs to.
        in_decoder: whether it is in the decoder of an encoder-decoder.
    """

    index: int
    name: str
    block: nn.Module
    spec: FamilySpec
    in_decoder: bool = False

    @property
    def gated(self) -> bool:
        """Whether an activated and a linear projection are multiplied."""
        path = self.spec.gate
        return self.spec.fused_gate or (path is not None and _has_path(self.block, path))

    @property
    def linear_in(self) -> nn.Module:
        """The linear layer from the model's width, its gate included where they are fused."""
        path = self.spec.gated_in if self.gated else None
        return self.block.get_submodule(path or self.spec.linear_in)

    @property
    def gate(self) -> nn.Module | None:
        """The activated linear layer beside it, in a gated FFN that has two."""
        if not self.gated or self.spec.gate is None:
            return None
        return self.block.get_submodule(self.spec.gate)

    @property
    def linear_out(self) -> nn.Module:
        """The linear layer back to the model's width."""
        return self.block.get_submodule(self.spec.linear_out)

    @property
    def activation(self) -> nn.Module:
        """The activation between them."""
        return self.block.get_submodule(self.spec.activation)

    @property
    def num_neurons(self) -> int:
        """F."""
        return self.weights().w_out.shape[1]

    @property
    def dropout(self) -> float:
        """The dropout probability between activation and second linear layer."""
        if self.spec.dropout is None:
            return 0.0
        parent, leaf = _parent(self.block, self.spec.dropout)
        value = getattr(parent, leaf)
        return float(value.p if isinstance(value, nn.Dropout) else value)

    def weights(self) -> FFNWeights:
        """Read the weights as (F, D) and (D, F): views of the model's own."""
        w_in, b_in = self._read(self.linear_in)
        w_out, b_out = self._read(self.linear_out)
        w_gate, b_gate = (None, None) if self.gate is None else self._read(self.gate)
        if self.spec.fused_gate:
            w_gate, w_in = w_in.chunk(2)
            b_gate, b_in = (None, None) if b_in is None else b_in.chunk(2)
        return FFNWeights(w_in, b_in, w_gate, b_gate, w_out, b_out)

    def replace(self, layer: nn.Module) -> None:
        """Put `layer`, (..., D) to (..., D), where the FFN was, and identities for its parts."""
        for path in self.spec.emptied:
            parent, leaf = _parent(self.block, path)
            setattr(parent, leaf, nn.Identity())
        parent, leaf = _parent(self.block, self.spec.replaced)
        setattr(parent, leaf, layer)
        if self.spec.dropout is not None:
            parent_path, _, leaf = self.spec.dropout.rpartition(".")
            if not parent_path:
                # BART applies it inline, around our layer; the experts apply it inside.
                setattr(self.block, leaf, 0.0)

    def _read(self, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return (weight.t() if self.spec.transposed else weight), bias


def known_family(model: nn.Module) -> FamilySpec | None:
    """Find the family of a model, dense or converted; None if the architecture is not known."""
    config: Any = getattr(model, "config", None)
    return FAMILIES.get(str(getattr(config, "model_type", "")).removeprefix("moe_"))


def half_fault(model: nn.Module) -> str:
    """Say why a model cannot compute in bfloat16; empty where it can."""
    spec = known_family(model)
    return "" if spec is None else spec.no_bf16


def family_of(model: nn.Module) -> FamilySpec:
    """Find a dense model's family; one not known, or converted already, is a ConversionError."""
    spec = known_family(model)
    config: Any = getattr(model, "config", None)
    if spec is not None and config.model_type != spec.model_type:
        raise ConversionError(
            f"{type(model).__name__} is a mixture of experts already",
            remedy="give the dense model that it was made from",
        )
    if spec is None:
        raise ConversionError(
            f"{type(model).__name__} has no feed-forward networks that moe-dist knows",
            remedy=f"use a model of one of these families: {', '.join(sorted(FAMILIES))}",
        )
    return spec


def position_limit(model: nn.Module) -> int | None:
    """How many tokens a model has positions for; None where its configuration sets no limit."""
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    # XLNet writes -1 where there is no limit.
    if not isinstance(limit, int) or limit < 1:
        return None
    spec = known_family(model)
    last = None if spec is None else spec.pad_position
    if isinstance(last, str):
        last = getattr(config, last)
    return limit if last is None else limit - last - 1


def find_slots(model: nn.Module, spec: FamilySpec | None = None) -> list[FFNSlot]:
    """List a dense model's FFNs, in the order of its modules; scores and plans are indexed alike.

    The family is by default what the model's configuration says; without FFNs a ConversionError.
    """
    spec = spec or family_of(model)
    blocks = [(name, module) for name, module in model.named_modules() if is_a(module, spec.blocks)]
    if not blocks:
        raise ConversionError(
            f"{type(model).__name__} holds none of {', '.join(spec.blocks)}",
            remedy="give a whole transformers model with at least one layer",
        )
    config: Any = model.config
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    return [
        FFNSlot(index, name, block, spec, decodes and "decoder" in name.split("."))
        for index, (name, block) in enumerate(blocks)
    ]


def find_stacks(model: nn.Module, spec: FamilySpec) -> Iterator[tuple[nn.Module, bool]]:
    """Yield the stacks that take token ids, each with whether its tokens see no later ones."""
    for module in model.modules():
        if is_a(module, spec.stacks):
            is_decoder = bool(getattr(getattr(module, "config", None), "is_decoder", False))
            yield module, is_decoder or is_a(module, spec.causal_stacks)


def find_attention(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """List the query and the key layer of each self-attention, in the order of the layers.

    A family whose scores are not products of what such layers give is a ConversionError.
    """
    spec = known_family(model)
    if spec is None or spec.no_attention:
        reason = "its family is not known" if spec is None else spec.no_attention
        known = ", ".join(name for name, family in FAMILIES.items() if not family.no_attention)
        raise ConversionError(
            f"the attention scores of {type(model).__name__} cannot be read: {reason}",
            remedy=f"set distill.attention_weight to 0, or use one of these families: {known}",
        )
    return [
        (module.get_submodule(spec.query), module.get_submodule(spec.key))
        for module in model.modules()
        if is_a(module, (spec.attention,))
    ]


def is_a(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module's class, or one that it inherits from, has one of these names."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def _has_path(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _parent(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent_path, _, leaf = path.rpartition(".")
    return module.get_submodule(parent_path), leaf
