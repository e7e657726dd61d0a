"""What to make of a student that is compacted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class CompactSettings:
    """What to make of a student.

    Args:
        directory: the student's.
        output: where results go.
        num_experts: experts of each layer afterwards; None for as many as there are.
        expert_size: neurons that an expert computes for a token afterwards; None for as many as
            there are.
        teacher: the model that the repair distils; the student as it was if None.
        method: ``merge`` or ``drop``.
        tolerance: of fusion.
        repair_steps: optimizer steps of the distillation afterwards; 0 for none.
        use_samples: training rows on which the use of experts is counted and neurons are scored.
    """

    directory: Path
    output: Path
    num_experts: int | None = None
    expert_size: int | None = None
    teacher: Path | None = None
    method: Literal["merge", "drop"] = "merge"
    tolerance: float = 1e-6
    repair_steps: int = 200
    use_samples: int = 2048
