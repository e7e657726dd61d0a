"""What a model costs by its shape: parameters and FLOPs, total and for one token.

Nothing runs here, so that models on the meta device can be counted too.

Shapes: S sequence, D model, F FFN, E experts, K active experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

from torch import nn

from moe_dist.conversion.families import FAMILIES, FamilySpec, find_stacks, is_a, known_family
from moe_dist.conversion.moe_slots import MoeSettings
from moe_dist.errors import ConversionError
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.merge import applying_is_cheaper
from moe_dist.moe.merge_gates import MergeGate, NoisyTopK, SequenceMergeGate, TokenMergeGate
from moe_dist.moe.merged_layer import MergedLayer

_LINEAR = ("Linear", "Conv1D", "Conv1d")
# Layers of DeBERTa's attention that see places in place of tokens.
_OF_PLACES = ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: all of them; shared ones count once.
        active: those a single token passes through: K of E experts in every MoE layer, one where
            experts are merged, and all of the rest. Embedding tables count whole in both, as papers
            count them.
    """

    total: int
    active: int


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of a forward pass for one token; a multiply-add counts as 2.

    Attributes:
        total: matrix products of the whole model, attention and head included. What a model
            does once for a sequence (pooler, classifier) is spread over its tokens. Norms,
            activations and softmax are left out.
        ffn: of it, the feed-forward networks: dense ones, or active experts and shared neurons
            without the router's gate. Of merged experts it is one, and a merge of K for each
            sequence, or segment of one, spread over its tokens.
    """

    total: float
    ffn: float


@dataclass(frozen=True)
class ExpertReads:
    """What a pass of one text reads of the routed experts, over all layers.

    Attributes:
        router: its name.
        num_tokens: of the text.
        once: whether a layer chooses once for a text, and not for each token.
        num_experts: of a layer.
        top_k: that a choice takes.
        distinct: experts that a layer is expected to read, mean over layers.
        weights_read: weights of these, of all layers.
        weights_of_one_choice: what one choice reads of all layers.
        weights_held: of all experts.
    """

    router: str
    num_tokens: int
    once: bool
    num_experts: int
    top_k: int
    distinct: float
    weights_read: float
    weights_of_one_choice: int
    weights_held: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's total and active parameters; it must not be spread over processes."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        (layer.num_experts - (1 if layer.merges else layer.top_k))
        * _size_of_one(layer.experts, bias=True)
        for layer in model.modules()
        if isinstance(layer, MoELayer)
    )
    return ParameterCount(total, total - idle)


def flops_per_token(model: nn.Module, seq_len: int) -> FlopCount:
    """Count the FLOPs of a forward pass from the shapes of the model's weights.

    An encoder-decoder is taken to read and write `seq_len` tokens each, and its FLOPs are those
    for one token read and one written. Causal attention counts whole, as it is computed.

    Args:
        model: of a known family, dense or converted.
        seq_len: tokens in a sequence, none of them padding.

    Returns:
        FLOPs for one token.

    Raises:
        ConversionError: if the architecture is not known.
    """
    spec = _family(model)
    ffn_names = set(_ffn_names(model, spec))
    causal = tuple(_causal_prefixes(model, spec))
    total = ffn = 0.0
    for name, module in _leaves(model):
        if isinstance(module, MergedLayer):
            num_merges = _num_merges(module, seq_len, is_causal=name.startswith(causal))
            experts = 2 * _merged_weights(module, seq_len, num_merges)
            ffn += experts
            total += experts + _merge_gate_flops(module, num_merges / seq_len)
        elif isinstance(module, MoELayer):
            experts = 2 * _active_weights(module)
            ffn += experts
            total += experts + _gate_flops(module)
        elif is_a(module, _LINEAR) and not name.endswith(_OF_PLACES):
            flops = 2.0 * _weight_size(module)
            if name in ffn_names:
                ffn += flops
            total += flops / seq_len if _is_pooled(name, model) else flops
        if is_a(module, (spec.attention,)):
            # Queries times keys and weights times values: 2 products of 2 * S * width.
            total += 4 * seq_len * int(attrgetter(spec.attention_width)(module))
        if is_a(module, ("DisentangledSelfAttention",)):
            total += _place_flops(module, seq_len)
    return FlopCount(total, ffn)


def expert_reads(
    model: nn.Module, num_tokens: int, loads: Mapping[str, Sequence[float]] | None = None
) -> ExpertReads | None:
    """Count what a pass of one text reads of a model's experts.

    A text of few tokens leaves experts out: of E experts n choices of K read about
    E · (1 − (1 − K/E)^n), as if each were drawn by itself. Tokens that come twice, and kinds of
    tokens that stand together, make it fewer.

    Args:
        model: with weights or without.
        num_tokens: of the text.
        loads: each expert's share of its layer's tokens by layer; even ones where not known.

    Returns:
        The count; None for a model without a router.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and module.router is not None
    ]
    if not layers:
        return None
    config: Any = model.config
    spec = MoeSettings.from_dict(config.moe).router
    once = spec.facts.chooses_by in ("sentence", "task")
    causal = tuple(_causal_prefixes(model, _family(model)))
    distinct, read, one_choice, held = [], 0.0, 0, 0
    for name, layer in layers:
        num_choices = 1 if once else num_tokens
        if isinstance(layer, MergedLayer):
            num_choices = _num_merges(layer, num_tokens, is_causal=name.startswith(causal))
        shares = (loads or {}).get(layer.name) or [1 / layer.num_experts] * layer.num_experts
        number = sum(1 - (1 - min(1.0, layer.top_k * share)) ** num_choices for share in shares)
        # One choice reads K of them, whichever they are.
        number = float(layer.top_k) if num_choices == 1 else number
        size = _size_of_one(layer.experts, bias=True)
        distinct.append(number)
        read += number * size
        one_choice += layer.top_k * size
        held += layer.num_experts * size
    return ExpertReads(
        router=spec.router,
        num_tokens=num_tokens,
        once=once,
        num_experts=layers[0][1].num_experts,
        top_k=layers[0][1].top_k,
        distinct=sum(distinct) / len(distinct),
        weights_read=read,
        weights_of_one_choice=one_choice,
        weights_held=held,
    )


def model_shape(model: nn.Module) -> dict[str, int]:
    """Give `num_layers` and `hidden_size`; of an encoder-decoder the encoder's."""
    config: Any = model.config
    return {
        "num_layers": int(config.num_hidden_layers),
        "hidden_size": int(config.hidden_size),
    }


def _family(model: nn.Module) -> FamilySpec:
    spec = known_family(model)
    if spec is None:
        raise ConversionError(
            f"the FLOPs of {type(model).__name__} cannot be counted",
            remedy=f"use a model of one of these families: {', '.join(sorted(FAMILIES))}",
        )
    return spec


def _ffn_names(model: nn.Module, spec: FamilySpec) -> Iterator[str]:
    paths = (spec.linear_in, spec.linear_out, spec.gated_in, spec.gate)
    for name, module in model.named_modules():
        if is_a(module, spec.blocks):
            yield from (f"{name}.{path}" for path in paths if path is not None)


def _leaves(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, without what lies inside an MoE layer."""
    yield prefix, model
    if not isinstance(model, MoELayer):
        for name, child in model.named_children():
            yield from _leaves(child, f"{prefix}.{name}" if prefix else name)


def _active_weights(layer: MoELayer) -> int:
    shared = 0 if layer.shared is None else _size_of_one(layer.shared, bias=False)
    return layer.top_k * _size_of_one(layer.experts, bias=False) + shared


def _causal_prefixes(model: nn.Module, spec: FamilySpec) -> Iterator[str]:
    names = {module: name for name, module in model.named_modules()}
    for stack, is_causal in find_stacks(model, spec):
        if is_causal:
            yield f"{names[stack]}." if names[stack] else ""


def _num_merges(layer: MergedLayer, seq_len: int, *, is_causal: bool) -> int:
    """How often the experts of a layer are merged for one sequence."""
    router = layer.router
    if is_causal and isinstance(router, SequenceMergeGate):
        return -(-seq_len // router.segment_length)
    return 1


def _merged_weights(layer: MergedLayer, seq_len: int, num_merges: int) -> float:
    """Weights that a token is multiplied with, and its part of those that are merged."""
    own = 1 + layer.top_k * num_merges / seq_len
    if applying_is_cheaper(seq_len, num_merges, layer.top_k):
        own = layer.top_k
    shared = 0 if layer.shared is None else _size_of_one(layer.shared, bias=False)
    return own * _size_of_one(layer.experts, bias=False) + shared


def _merge_gate_flops(layer: MergedLayer, merges_per_token: float) -> float:
    """The gates' scores for each merge, and the small network of each token where there is one.

    What sizes the noise is read in training alone.
    """
    router = cast(MergeGate, layer.router)
    gates = sum(_weight_size(cast(NoisyTopK, gate).gate) for gate in router.gates.values())
    block = 0
    if isinstance(router, TokenMergeGate):
        block = _weight_size(router.down) + _weight_size(router.up)
    return 2 * (gates * merges_per_token + block)


def _size_of_one(experts: Experts, *, bias: bool) -> int:
    sizes = (
        parameter.numel() // experts.num_experts
        for parameter in experts.parameters(recurse=False)
        if bias or parameter.dim() == 3
    )
    return sum(sizes)


def _gate_flops(layer: MoELayer) -> float:
    if layer.router is None:
        return 0.0
    return sum(2.0 * _weight_size(m) for m in layer.router.modules() if is_a(m, _LINEAR))


def _place_flops(attention: Any, seq_len: int) -> float:
    """What a DeBERTa does beyond queries and keys: contents times places, and places projected."""
    if not attention.relative_attention:
        return 0.0
    # The first version looks at as many places as the sequence has, the second one at all.
    span = getattr(attention, "pos_ebd_size", min(seq_len, attention.max_relative_positions))
    num_terms = sum(term in attention.pos_att_type for term in ("c2p", "p2c"))
    num_projections = 2 if getattr(attention, "share_att_key", False) else num_terms
    width = attention.all_head_size
    one_each = 2 * (2 * span) * width  # a product with one vector for each place to either side
    return float(num_terms * one_each + num_projections * one_each * width / seq_len)


def _weight_size(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.numel())


def _is_pooled(name: str, model: nn.Module) -> bool:
    """Whether a linear layer sees one vector of a sequence instead of its tokens."""
    parts = name.split(".")
    if "pooler" in parts or "classification_head" in parts:
        return True
    per_sequence = ("ForSequenceClassification", "ForMultipleChoice")
    heads = ("classifier", "pre_classifier", "head", "sequence_summary")
    return parts[0] in heads and type(model).__name__.endswith(per_sequence)
