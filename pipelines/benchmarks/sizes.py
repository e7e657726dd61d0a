"""What benchmarks share: the check of their sizes, and the number of CPU threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def below_one(settings: object, *names: str, called: Mapping[str, str] | None = None) -> list[str]:
    """Name each size below 1, with which there would be nothing to measure.

    `called` has the names that messages use, where they are others than the fields'.
    """
    shown = called or {}
    return [
        f"{shown.get(name, name)} is {getattr(settings, name)}; it must be at least 1"
        for name in names
        if getattr(settings, name) < 1
    ]


@contextmanager
def cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads in this process; its own choice if None."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
