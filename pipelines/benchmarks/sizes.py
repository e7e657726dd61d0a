"""The check that every benchmark makes of its sizes."""

from __future__ import annotations


def below_one(settings: object, *names: str) -> list[str]:
    """List the sizes with which there would be nothing to measure.

    Args:
        settings: of a benchmark.
        *names: its sizes.

    Returns:
        One fault for each that is less than 1.
    """
    return [
        f"{name} is {getattr(settings, name)}; it must be at least 1"
        for name in names
        if getattr(settings, name) < 1
    ]
