"""What kind of setting each key is, read from the one place that says so: its field.

`learning`: what is learned, or what it is measured on. A change redoes the stages that read it,
and is another run for the tracking server. `placement`: where and how the work is done; a result
fits any of them. `observation`: what is watched, recorded or put beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from moe_dist.config.sections import Section

Kind = Literal["learning", "placement", "observation"]


def settings_of_kind(section: Section, kind: Kind = "learning") -> dict[str, Any]:
    """Give the settings of one kind that are read, as plain values; no empty sections."""
    plain = section.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            inner = settings_of_kind(value, kind)
            found |= {name: inner} if inner else {}
        elif kind_of(type(section), name) == kind and _is_read(section, name):
            found[name] = plain[name]
    return found


def kind_of(section: type[Section], name: str) -> Kind:
    """Give what a field, which is no section itself, is marked as, else its section."""
    kind: Kind = _mark(section, name).get("kind", section.setting_kind)
    return kind


def keys_of(section: type[Section]) -> Iterator[tuple[str, type[Section], str]]:
    """Yield each key's dotted name, the section that holds its field, and the field's name."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from ((f"{name}.{dotted}", owner, own) for dotted, owner, own in keys_of(inner))
        else:
            yield name, section, name


def in_flight_meaning(section: type[Section], name: str) -> str:
    """Say what a field's new value means in flight; empty for one that may not change."""
    meaning: str = _mark(section, name).get("in_flight", "")
    return meaning


def _is_read(section: Section, name: str) -> bool:
    """Whether a loss is used that reads a field; True where no loss decides it."""
    mark = _mark(type(section), name)
    weights = mark.get("read_with")
    if weights is None:
        return True
    changes = "unread_at" not in mark or getattr(section, name) != mark["unread_at"]
    return changes and any(getattr(section, weight) > 0 for weight in weights)


def _mark(section: type[Section], name: str) -> dict[str, Any]:
    extra = section.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}
