"""Dotted overrides, such as `{moe.top_k: 2}` in a comparison, written into nested settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def apply_overrides(raw: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Write overrides, by dotted keys or nested mappings, into nested settings, in place."""
    for dotted, value in overrides.items():
        *parents, last = str(dotted).split(".")
        target = raw
        for parent in parents:
            inner = target.get(parent)
            if not isinstance(inner, dict):
                # A list of comparison names keeps its names when one of them is overridden.
                inner = {name: {} for name in inner} if isinstance(inner, list) else {}
                target[parent] = inner
            target = inner
        if isinstance(value, Mapping) and isinstance(target.get(last), dict):
            apply_overrides(target[last], value)
        else:
            target[last] = copy.deepcopy(value)
