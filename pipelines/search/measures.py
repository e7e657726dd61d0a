"""How a sweep's measures are written."""

from __future__ import annotations

import math

from moe_dist.config.search_section import COSTS

from ..console import quantity


def shown(measure: str, value: float) -> str:
    """Write one measure with a few digits; empty where it is missing."""
    if math.isnan(value):
        return ""
    if measure == "latency":
        return f"{value:.1f} ms"
    return quantity(value) if measure in COSTS else f"{value:.4f}"
