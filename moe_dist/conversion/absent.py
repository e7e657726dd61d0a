"""Modules that a model was built without, by arguments that no configuration keeps.

``BertModel(config, add_pooling_layer=False)`` is such a model: its class, built from its
configuration alone, has a pooler whose weights nobody has.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def absent_modules(model: nn.Module, whole: nn.Module) -> list[str]:
    """Name (dotted) the modules that are None in `model`, but not in `whole`, its class's own."""
    own = dict(model.named_modules())
    found = []
    for name, _ in whole.named_modules():
        parent, _, leaf = name.rpartition(".")
        if name not in own and parent in own and getattr(own[parent], leaf, 0) is None:
            found.append(name)
    return found


def leave_out(model: nn.Module, names: Iterable[str]) -> None:
    """Take modules, named as by `absent_modules`, off a model in place."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, None)
