"""Finds the package `cluster`, which a wheel holds under another name."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def cluster_module(name: str) -> Any:
    """Import a module of `cluster`, from a checkout or as `moe_dist._cluster` of a wheel."""
    is_installed = __package__ is not None and __package__.startswith("moe_dist.")
    return import_module(f"{'moe_dist._cluster' if is_installed else 'cluster'}.{name}")
