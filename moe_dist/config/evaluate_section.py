"""The recipe's `evaluate` section: what the measured models must be."""

from __future__ import annotations

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
