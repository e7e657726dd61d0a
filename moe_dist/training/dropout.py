"""Changing how much a model in memory drops while it trains; what is saved of it stays the same."""

from __future__ import annotations

from torch import nn


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout that a model has the same probability, from 0 to below 1, in place.

    Modules and plain numbers (BART's, T5's attention, experts) alike. One of 0 stays 0: there the
    architecture has none, or another module drops. BART's dropping of whole layers is left alone,
    and so is the configuration, which is what is saved.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = probability
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float) and value > 0:
                setattr(module, name, probability)
