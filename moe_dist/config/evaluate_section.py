"""The recipe's `evaluate` section: what the measured models must be."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_dist.config.sections import Number, Section


class EvaluateConfig(Section):
    """What is asked of the student once it is measured."""

    setting_kind = "observation"

    require_speedup: Number | None = Field(
        default=None,
        gt=0,
        description="How many times as fast as its teacher the student must be, each in its "
        "fastest form on this machine, at batch 1 and at batch 32. If it is not, or if the machine "
        "was too busy to tell, `compress` and `evaluate` end with an error after all results are "
        "written. `--require-speedup` sets it.",
    )
    forms: Literal["auto", "eager"] = Field(
        default="auto",
        description="In which forms models are timed: `auto` tries every eager and lean form of "
        "each and takes its fastest; `eager` times all as they were trained, in `eager-fp32`, "
        "without making copies. Another value makes the stage `evaluate` start anew.",
    )
