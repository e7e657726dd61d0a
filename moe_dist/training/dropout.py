"""Changing how much a model in memory drops while it trains; what is saved of it stays the same."""

from __future__ import annotations

from torch import nn


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout of a model the same probability.

    Hugging Face's models keep some in modules and some as plain numbers (BART's, T5's attention),
    and experts keep theirs as a number too. BART's dropping of whole layers is left alone.

    Args:
        model: changed in place; its configuration, and so what is saved, is not.
        probability: from 0, which drops nothing, to below 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(module, name, probability)
