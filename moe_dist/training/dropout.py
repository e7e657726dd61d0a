"""Changing how much a model in memory drops while it trains; what is saved of it stays the same."""

from __future__ import annotations

from torch import nn


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout that a model has the same probability.

    Hugging Face's models keep some in modules and some as plain numbers (BART's, T5's attention),
    and experts keep theirs as a number too. One of 0 stays 0: the architecture has none there
    (BERT's and GPT-2's experts), or another module drops in its place (BART's FFN, whose experts
    do). BART's dropping of whole layers is left alone.

    Args:
        model: changed in place; its configuration, and so what is saved, is not.
        probability: from 0, which drops nothing, to below 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = probability
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float) and value > 0:
                setattr(module, name, probability)
