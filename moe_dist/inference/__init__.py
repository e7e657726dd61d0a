"""Saving and loading models, and measuring them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.inference.saving import load_model, load_tokenizer, save_model

__all__ = ["load_model", "load_tokenizer", "save_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("moe_dist.inference.saving"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
