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

    Args:
        vocab_size: token embeddings.
        d_model: width.
        num_layers: layers.
        num_neurons: of each FFN.
        max_tokens: of the longest sentence; positions for 512 are there in any case.
        seed: of the weights.

    Returns:
        A dense classifier.
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
