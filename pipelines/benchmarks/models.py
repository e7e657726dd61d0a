"""Models of random weights to be measured, as their time does not depend on training."""

from __future__ import annotations

from typing import Any

import torch


def random_classifier(
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_neurons: int,
    max_tokens: int = 512,
    seed: int = 0,
) -> Any:
    """Draw a BERT with a head for two classes, heads of attention 32 wide.

    It has positions for 512 tokens even where `max_tokens` is less.
    """
    from transformers import BertConfig, BertForSequenceClassification

    config: Any = BertConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, d_model // 32),
        intermediate_size=num_neurons,
        max_position_embeddings=max(512, max_tokens),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def random_language_model(
    *, vocab_size: int, d_model: int, num_layers: int, num_neurons: int, max_tokens: int
) -> Any:
    """Draw a BERT that predicts masked tokens, heads of attention 64 wide.

    Its attention is made of matrix products, which counters of FLOPs know on every device.
    """
    from transformers import BertConfig, BertForMaskedLM

    config: Any = BertConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, d_model // 64),
        intermediate_size=num_neurons,
        max_position_embeddings=max(512, max_tokens),
        attn_implementation="eager",
    )
    return BertForMaskedLM(config).eval()
