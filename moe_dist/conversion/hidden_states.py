"""Hidden states as every architecture has them: one list and one mask for each stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class StackStates:
    """What one stack of a model shows.

    Args:
        states: (B, S, D) of the embeddings and each layer.
        mask_BS: True or 1 for real tokens; None if all are real.
    """

    states: tuple[Tensor, ...]
    mask_BS: Tensor | None


def hidden_stacks(output: Any, inputs: Mapping[str, Tensor]) -> tuple[StackStates, ...]:
    """Take the hidden states out of a forward's output; of encoder and decoder in this order."""
    mask_BS = inputs.get("attention_mask")
    encoder = getattr(output, "encoder_hidden_states", None)
    if encoder is None:
        return (StackStates(tuple(output.hidden_states), mask_BS),)
    return (
        StackStates(tuple(encoder), mask_BS),
        StackStates(
            tuple(output.decoder_hidden_states),
            with_decoder_mask(inputs).get("decoder_attention_mask"),
        ),
    )


def with_decoder_mask(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Add `decoder_attention_mask` where an encoder-decoder's decoder tokens are not given.

    transformers leaves it open, since no answer depends on it; who counts or compares tokens needs
    it. The last real one counts as padding: the longest sample has no place for it.
    """
    labels = inputs.get("labels")
    own = {"decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask"}
    given = any(inputs.get(name) is not None for name in own)
    if given or (isinstance(labels, Tensor) and labels.dim() > 1):
        return dict(inputs)
    mask_BS = inputs.get("attention_mask")
    return dict(inputs) if mask_BS is None else {**inputs, "decoder_attention_mask": mask_BS}


def stack_depths(model: nn.Module) -> tuple[int, ...]:
    """Count the layers (no embeddings) of the one stack, or of encoder and decoder."""
    config: Any = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return (int(config.num_hidden_layers),)
    # BART calls them decoder_layers, T5 num_decoder_layers.
    depth = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    return (int(config.num_hidden_layers), int(depth))
