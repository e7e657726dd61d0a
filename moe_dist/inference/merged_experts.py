"""Experts that are merged have the eager form alone."""

from __future__ import annotations

from typing import Any

from moe_dist.conversion.heads import read_heads
from moe_dist.errors import ConversionError
from moe_dist.moe.layer import MoELayer
from moe_dist.router_spec import router_facts


def refuse_merged_experts(model: Any, form: str) -> None:
    """See that a model does not merge its experts.

    Args:
        model: dense or converted.
        form: that it is to have, in an error's words.

    Raises:
        ConversionError: if it merges them; the remedy is the dense model that its router allows.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    merging = [layer for layer in layers if layer.merges]
    if not merging:
        return
    by_task = router_facts(model.config.moe["router"]).chooses_by == "task"
    way = "--fold" if by_task else "--average"
    task = " --task NAME" if read_heads(model) else ""
    raise ConversionError(
        f"{merging[0].name} merges its experts, which has no {form} form",
        remedy="use the eager form; or make a dense model of it first, with `moe-dist export DIR "
        f"{way}{task}`, and take that",
    )
