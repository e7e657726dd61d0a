"""Overrides of the command line: `moe.top_k=2` is YAML, `data.label_column=#1` the text itself."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from moe_dist.config.faults import annotation_of
from moe_dist.config.yaml_values import describe_yaml_error, hidden_syntax, parse_yaml
from moe_dist.errors import ConfigError


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` texts.

    The value of a key that holds text is taken as it stands, whatever it would mean in YAML; in
    quotes it is what they enclose, and `null` or nothing stands for "not given".
    A key of names takes one name so, or a YAML list. All other values are YAML.

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
            parsed[key] = _parse(key, value.strip())
        except yaml.YAMLError as error:
            reason = describe_yaml_error(error)
            faults.append(f"override {text!r} has no YAML value ({reason}); quote it.")
        except ValueError as error:
            faults.append(f"override {text!r} {error}")
    if faults:
        raise ConfigError(faults, source="overrides")
    return parsed


def _parse(key: str, value: str) -> Any:
    annotation = annotation_of(key)
    takes_names = _takes_names(annotation)
    if _is_text(annotation) or (takes_names and not value.startswith("[")):
        if value == "null" or (not value and _is_optional(annotation)):
            return None
        return _unquoted(value)
    found = hidden_syntax(value)
    if found:
        raise ValueError(f"holds {found}, which is no part of a value; remove it, or quote it.")
    return parse_yaml(value)


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        try:
            inner = parse_yaml(value)
        except yaml.YAMLError:
            return value
        if isinstance(inner, str):
            return inner
    return value


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, `Annotated` taken off."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for inner in typing.get_args(annotation) for part in _parts(inner))
    return (annotation,)


def _is_optional(annotation: Any) -> bool:
    return type(None) in _parts(annotation)


def _is_text(annotation: Any) -> bool:
    kinds = set(_parts(annotation)) - {type(None)}
    return bool(kinds) and kinds <= {str, Path}


def _takes_names(annotation: Any) -> bool:
    kinds = [part for part in _parts(annotation) if part is not type(None)]
    return len(kinds) == 1 and kinds[0] == tuple[str, ...]
