"""The head that comes with a start model: whose rows stand for which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class HeadUse:
    """How a task takes a trained head over.

    Args:
        rows: of each of the task's classes the head's row; None draws the head anew.
        line: what to say of it; empty where there is nothing to say.
        is_guess: whether classes were matched by place and not by name.
    """

    rows: tuple[int, ...] | None
    line: str = ""
    is_guess: bool = False


def own_names(entries: Mapping[str, Any], count: int) -> tuple[list[str], str]:
    """Read what a start model's config.json calls its outputs, in their order, and what is wrong.

    There are no names where they do not stand for `count` outputs.
    """
    by_number = {int(number): str(name) for number, name in _pairs(entries.get("id2label"))}
    by_name = {int(number): str(name) for name, number in _pairs(entries.get("label2id"))}
    found = by_number or by_name
    names = [name for _, name in sorted(found.items())]
    if sorted(found) != list(range(count)):
        return [], ""
    if by_number and by_name and by_number != by_name:
        return names, "id2label and label2id contradict each other: id2label is followed"
    return names, ""


def match_head(own: Sequence[str], wanted: Sequence[str]) -> HeadUse:
    """Say which row of a trained head stands for which class of a task.

    Args:
        own: the head's names, in the order of its rows; or none.
        wanted: the task's.

    Returns:
        Rows by name where the names are the same but for case; in the head's order where nothing
        can be told from them; a new head where they contradict the order.
    """
    own_keys, wanted_keys = _keys(own), _keys(wanted)
    identity = tuple(range(len(wanted)))
    if sorted(own_keys) == sorted(wanted_keys) and len(set(own_keys)) == len(own_keys):
        rows = tuple(own_keys.index(key) for key in wanted_keys)
        if rows == identity:
            return HeadUse(identity)
        return HeadUse(
            rows, f"its head has the classes as {_listed(own)}: put in order as {_listed(wanted)}"
        )
    if own_keys in ([], _keys(_generic(len(own))), [str(index) for index in identity]):
        return HeadUse(identity, f"its head has no names, and is read as {_listed(wanted)}")
    pairs = ", ".join(
        f"output {index} ({old}) as {new}"
        for index, (old, new) in enumerate(zip(own, wanted, strict=True))
    )
    elsewhere = [
        name
        for name, key, other in zip(wanted, wanted_keys, own_keys, strict=True)
        if key != other and key in own_keys
    ]
    if elsewhere:
        return HeadUse(
            None,
            f"its head has other classes ({_listed(own)}), and {_listed(elsewhere)} at another "
            "place: a new head is drawn",
        )
    return HeadUse(
        identity, f"its head has other names, and is taken by place: {pairs}", is_guess=True
    )


def put_in_order(layer: Any, use: HeadUse, *, std: float, seed: int) -> None:
    """Let a classifier's last layer answer in the task's order, in place.

    `std` is the standard deviation of new weights.
    """
    with torch.no_grad():
        if use.rows is None:
            layer.weight.normal_(std=std, generator=torch.Generator().manual_seed(seed))
            if layer.bias is not None:
                layer.bias.zero_()
            return
        for parameter in layer.parameters():
            parameter.copy_(parameter[list(use.rows)].clone())


def _pairs(entry: Any) -> list[tuple[Any, Any]]:
    return list(entry.items()) if isinstance(entry, dict) else []


def _keys(names: Sequence[str]) -> list[str]:
    return [" ".join(name.casefold().replace("_", " ").replace("-", " ").split()) for name in names]


def _generic(count: int) -> list[str]:
    return [f"LABEL_{index}" for index in range(count)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
