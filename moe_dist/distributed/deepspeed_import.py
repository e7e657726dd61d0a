"""Imports DeepSpeed, and not what it imports merely because it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNUSED = "mlflow"
"""Of DeepSpeed's autotuner, which nobody here calls; nearly half of the time of its import."""


@contextmanager
def _as_if_missing(name: str) -> Iterator[None]:
    """Let an import of a module fail, unless it is there already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


with _as_if_missing(_UNUSED):
    import deepspeed  # noqa: F401
