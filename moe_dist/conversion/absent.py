"""Modules that a model was built without, by arguments that no configuration keeps.

``BertModel(config, add_pooling_layer=False)`` is such a model: its class, built from its
configuration alone, has a pooler whose weights nobody has.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def absent_modules(model: nn.Module, whole: nn.Module) -> list[str]:
    """Find what a model lacks.

    Args:
        model: what somebody built.
        whole: what its class builds from its configuration.

    Returns:
        Dotted names of modules of the second that are None in the first.
    """
    own = dict(model.named_modules())
    found = []
    for name, _ in whole.named_modules():
        parent, _, leaf = name.rpartition(".")
        if name not in own and parent in own and getattr(own[parent], leaf, 0) is None:
            found.append(name)
    return found


def leave_out(model: nn.Module, names: Iterable[str]) -> None:
    """Take modules off a model.

    Args:
        model: changed in place.
        names: dotted, from `absent_modules`.
    """
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, None)
