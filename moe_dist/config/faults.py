"""Faults of single keys: pydantic's errors in the words of a recipe."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moe_dist.config.run_config import RunConfig
from moe_dist.config.yaml_values import WrittenInt, parse_yaml

# Stand-ins for required keys, so that all other keys can still be checked.
_STAND_INS: dict[str, Any] = {
    "name": "unnamed",
    "model": {"teacher": "unknown"},
    "model.teacher": "unknown",
    "data": {"source": "hub"},
    "data.source": "hub",
}
_SHOWN_BITS = 256
_NOT_BUILT = {"export": "the export settings"}
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text (put numbers in quotes)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "path_type": "a path",
    "model_type": "a section with keys",
}


_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def check_keys(raw: Mapping[str, Any]) -> tuple[RunConfig, list[str], frozenset[str]]:
    """Check each key on its own.

    Args:
        raw: nested settings as read from a recipe.

    Returns:
        The settings with stand-ins for what is at fault, one line for each fault, and the dotted
        keys (or whole sections) at fault.
    """
    # YAML keys may be numbers; as text they are unknown keys like any other.
    pruned: dict[str, Any] = {
        str(key): {str(inner): entry for inner, entry in value.items()}
        if isinstance(value, Mapping)
        else value
        for key, value in raw.items()
    }
    faults: list[str] = []
    faulty: set[str] = set()
    while True:
        try:
            return RunConfig.model_validate(pruned), faults, frozenset(faulty)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                keys = tuple(str(part) for part in details["loc"])
                fault = _describe(details, keys)
                if fault not in faults:
                    faults.append(fault)
                path = keys[: _depth(keys)]
                faulty.add(".".join(path))
                _replace(pruned, path)


def annotation_of(dotted: str) -> Any:
    """Give the type of a dotted key; of its innermost known part where there is no such key."""
    keys = tuple(dotted.split("."))
    # compare.LABEL.moe.router is a moe.router.
    is_compared = keys[0] == "compare" and len(keys) > 2
    return _annotation(keys[2:] if is_compared else keys)


def either(values: Sequence[object]) -> str:
    """Join at least one choice for a remedy, such as `1, 2 or 4`."""
    words = [str(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _depth(keys: tuple[str, ...]) -> int:
    """Say how many parts of an error's location are keys of a recipe."""
    field = RunConfig.model_fields.get(keys[0])
    return 2 if field is not None and _section_of(field.annotation) is not None else 1


def _replace(pruned: dict[str, Any], path: tuple[str, ...]) -> None:
    stand_in = _STAND_INS.get(".".join(path))
    target = pruned
    for key in path[:-1]:
        target = target[key]
    target.pop(path[-1], None)
    if stand_in is not None:
        target[path[-1]] = stand_in


def _describe(details: ErrorDetails, keys: tuple[str, ...]) -> str:
    dotted, kind, value = ".".join(keys), details["type"], details["input"]
    context: dict[str, Any] = details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(keys)
    if kind == "missing":
        return f"{dotted} is missing; give it. {_description(keys)}"
    shown = f"{dotted}={_show(value)}"
    if kind == "literal_error":
        return _wrong_choice(shown, dotted, keys, value)
    if kind in _WANTED:
        return f"{shown} is not {_WANTED[kind].partition(' (')[0]}; give {_WANTED[kind]}."
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = f"{words} {_plain_number(context[key])}"
        return f"{shown} is not {bound}; give a value {bound}."
    if kind == "too_short":
        return f"{shown} is empty; name at least one, or leave the key out."
    if kind == "too_long":
        return f"{shown} has too many entries; give at most {context['max_length']}."
    if kind == "string_pattern_mismatch":
        return f"{shown} cannot name a directory; use letters, digits, dots, dashes, underscores."
    if kind == "value_error":
        return f"{shown} {context['error']}"
    reason = details["msg"]
    return f"{shown}: {reason[:1].lower()}{reason[1:]}; see docs/configuration.md for {dotted}."


def _wrong_choice(shown: str, dotted: str, keys: tuple[str, ...], value: Any) -> str:
    choices = _choices(_annotation(keys))
    now = ", ".join(_show(choice) for choice in choices)
    if dotted == "parallel.zero_stage" and value == 3:
        return f"{shown} cannot spread experts; use stage {now}."
    if dotted == "search.algorithm" and value == "bohb":
        return (
            f"{shown} is not built: it needs hpbandster, which has had no release since 2018 and "
            "brings Pyro4, netifaces and statsmodels; use algorithm tpe with scheduler hyperband, "
            "which joins the same two ideas."
        )
    return f"{shown} is not a choice; use one of {now}.{_did_you_mean(value, choices)}"


def _unknown_key(keys: tuple[str, ...]) -> str:
    dotted = ".".join(keys)
    if len(keys) == 1 and dotted in _NOT_BUILT:
        return f"{dotted}: {_NOT_BUILT[dotted]} is not built yet; remove the section."
    section = RunConfig if len(keys) == 1 else _section_of(_annotation(keys[:-1])) or RunConfig
    known = list(section.model_fields)
    elsewhere = [
        f"{name}.{keys[-1]}"
        for name, field in RunConfig.model_fields.items()
        if (other := _section_of(field.annotation)) and keys[-1] in other.model_fields
    ]
    guess = _did_you_mean(keys[-1], known)
    if elsewhere:
        guess = f" Did you mean {' or '.join(elsewhere)}?"
    where = f"keys of {'.'.join(keys[:-1])}" if len(keys) > 1 else "top-level keys"
    return f"{dotted} is an unknown key; {where}: {', '.join(known)}.{guess}"


def _did_you_mean(value: Any, choices: typing.Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _annotation(keys: tuple[str, ...]) -> Any:
    section: type[BaseModel] = RunConfig
    annotation: Any = RunConfig
    for key in keys:
        entry = _entry_of(annotation)
        field = section.model_fields.get(key)
        if entry is None and field is None:
            break
        annotation = entry if field is None or entry is not None else field.annotation
        section = _section_of(annotation) or section
    return annotation


def _description(keys: tuple[str, ...]) -> str:
    section = RunConfig if len(keys) == 1 else _section_of(_annotation(keys[:-1]))
    assert section is not None
    return section.model_fields[keys[-1]].description or ""


def _section_of(annotation: Any) -> type[BaseModel] | None:
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def _entry_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a mapping from names to sections holds, None allowed beside it."""
    for part in (annotation, *typing.get_args(annotation)):
        # `Annotated` hides what it annotates.
        inner = typing.get_args(part)[0] if hasattr(part, "__metadata__") else part
        if typing.get_origin(inner) is dict:
            return _section_of(typing.get_args(inner)[1])
    return None


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return tuple(choice for part in typing.get_args(annotation) for choice in _choices(part))


def _show(value: Any) -> str:
    """Write a value as a recipe would; text that YAML reads as something else gets quotes."""
    if isinstance(value, WrittenInt):
        text = value.text
    elif isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        text = f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} or more"
    elif value is None or isinstance(value, bool | float):
        text = yaml.safe_dump(value).removesuffix("\n...\n")
    else:
        plain = isinstance(value, str) and _is_plain(value)
        text = value if plain else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _is_plain(text: str) -> bool:
    try:
        return parse_yaml(text) == text
    except yaml.YAMLError:
        return False
