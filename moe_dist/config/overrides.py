"""Dotted overrides: `moe.top_k=2` on the command line, `{moe.top_k: 2}` in a comparison."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from moe_dist.config.yaml_values import describe_yaml_error, parse_yaml
from moe_dist.errors import ConfigError


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` texts; the values are YAML.

    Args:
        overrides: texts such as `moe.layers=[0, 2]`; a later one wins over an earlier one.

    Returns:
        Dotted key to value, in the order given.

    Raises:
        ConfigError: with every text that cannot be read.
    """
    parsed: dict[str, Any] = {}
    faults = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            faults.append(f"override {text!r} is not key=value; write for example moe.top_k=2.")
            continue
        try:
            parsed[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            reason = describe_yaml_error(error)
            faults.append(f"override {text!r} has no YAML value ({reason}); quote it.")
    if faults:
        raise ConfigError(faults, source="overrides")
    return parsed


def apply_overrides(raw: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Write overrides into nested settings, in place.

    Args:
        raw: nested settings.
        overrides: dotted keys, or nested mappings that are merged key by key.
    """
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
