"""What the axes of parameters run over, by family, for students that are cut from a teacher.

Families without a layout cannot be cut; `WHY_NOT` has the reason where it is more than that nobody
has written one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from moe_dist.conversion.families import FamilySpec
from moe_dist.errors import ConversionError

HIDDEN, NEURON, QUERY, VALUE, WHOLE = "hidden", "neuron", "query", "value", "whole"
Axes = tuple[str, ...]


class AttentionPaths(NamedTuple):
    """Paths, below a block, of the linear layers of its attention."""

    query: str
    key: str
    value: str
    out: str


@dataclass(frozen=True)
class ShrinkLayout:
    """The names of what a student is cut from.

    Args:
        layers: what stands before a layer's number in the names of its parameters.
        axes: what each axis of a parameter runs over, by the end of the parameter's name.
        attention: where a block has its attention.
        narrows_heads: heads may become smaller, each by dimensions of its own choice: neither are
            they rotated in pairs, nor do several share a key.
        drops_heads: layers may keep different heads.
        normalises_after: what blocks read has been normalised to the size that the parameters of
            the normalisations tell.
        own_embeddings: embeddings may have a width of their own, `embedding_size`.
    """

    layers: str
    axes: Mapping[str, Axes]
    attention: AttentionPaths
    narrows_heads: bool = True
    drops_heads: bool = True
    normalises_after: bool = True
    own_embeddings: bool = False


def _linear(out: str, into: str, *names: str) -> dict[str, Axes]:
    """Axes of linear layers of these names, each with its bias."""
    weights: dict[str, Axes] = {f"{name}.weight": (out, into) for name in names}
    return weights | {f"{name}.bias": (out,) for name in names}


def _vectors(*names: str) -> dict[str, Axes]:
    return {f"{name}.{part}": (HIDDEN,) for name in names for part in ("weight", "bias")}


def _encoder(
    layers: str,
    attention: AttentionPaths,
    *,
    neurons: tuple[str, str] = ("intermediate.dense", "output.dense"),
    drops_heads: bool = True,
    own_embeddings: bool = False,
) -> ShrinkLayout:
    """Describe an encoder of BERT's kind, with a head for classification or answers."""
    heads = ("pooler.dense", "classifier.dense", "pre_classifier", "sequence_summary.summary")
    axes = {
        "embeddings.weight": (WHOLE, HIDDEN),
        "relative_attention_bias.weight": (WHOLE, WHOLE),
        **_vectors("LayerNorm", "layer_norm"),
        **_linear(QUERY, HIDDEN, attention.query, attention.key),
        **_linear(VALUE, HIDDEN, attention.value),
        **_linear(HIDDEN, VALUE, attention.out),
        **_linear(NEURON, HIDDEN, neurons[0]),
        **_linear(HIDDEN, NEURON, neurons[1]),
        **_linear(HIDDEN, WHOLE, "embeddings_project"),
        **_linear(HIDDEN, HIDDEN, *heads),
        **_linear(WHOLE, HIDDEN, "classifier", "classifier.out_proj", "qa_outputs"),
    }
    return ShrinkLayout(
        layers=layers,
        axes=axes,
        attention=attention,
        drops_heads=drops_heads,
        own_embeddings=own_embeddings,
    )


_BERT_ATTENTION = AttentionPaths(
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)
_BERT = _encoder("encoder.layer.", _BERT_ATTENTION)
# Queries come in groups that share keys and values, and a rotation ties a head's dimensions in
# pairs to frequencies: so whole groups are kept, and "value" runs over keys, too.
_LLAMA = ShrinkLayout(
    layers="layers.",
    axes={
        "embed_tokens.weight": (WHOLE, HIDDEN),
        "norm.weight": (HIDDEN,),
        "q_norm.weight": (WHOLE,),
        "k_norm.weight": (WHOLE,),
        **_vectors("layernorm"),
        **_linear(QUERY, HIDDEN, "q_proj"),
        **_linear(VALUE, HIDDEN, "k_proj", "v_proj"),
        **_linear(HIDDEN, QUERY, "o_proj"),
        **_linear(NEURON, HIDDEN, "up_proj", "gate_proj"),
        **_linear(HIDDEN, NEURON, "down_proj"),
        **_linear(WHOLE, HIDDEN, "lm_head", "score", "qa_outputs"),
    },
    narrows_heads=False,
    normalises_after=False,
    attention=AttentionPaths(
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
    ),
)
LAYOUTS: dict[str, ShrinkLayout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _BERT),
    "electra": _encoder("encoder.layer.", _BERT_ATTENTION, own_embeddings=True),
    # All layers share one bias of places for each head, so all keep the same heads.
    "mpnet": _encoder(
        "encoder.layer.",
        AttentionPaths(
            "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"
        ),
        drops_heads=False,
    ),
    "distilbert": _encoder(
        "transformer.layer.",
        AttentionPaths(
            "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"
        ),
        neurons=("ffn.lin1", "ffn.lin2"),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
}
_BY_PLACES = "its attention projects places beside tokens"
WHY_NOT = {
    "deberta": _BY_PLACES,
    "deberta-v2": _BY_PLACES,
    "modernbert": "its queries, keys and values are one layer, with dimensions rotated in pairs",
    "gpt2": "its queries, keys and values are one layer",
    "t5": "encoder and decoder would have to be cut alike",
    "bart": "encoder and decoder would have to be cut alike",
}


def layout_of(model: nn.Module, spec: FamilySpec) -> ShrinkLayout:
    """Find a family's layout; a family that cannot be cut is a ConversionError that says why."""
    if spec.model_type not in LAYOUTS:
        reason = WHY_NOT.get(spec.model_type, "no layout of its parameters is known")
        raise ConversionError(
            f"a smaller student of {type(model).__name__} cannot be made: {reason}",
            remedy="leave the student section out, or use a teacher of one of these families: "
            f"{', '.join(LAYOUTS)}",
        )
    return LAYOUTS[spec.model_type]
