"""The part that a student keeps of its teacher's metric."""

from __future__ import annotations

import math


def ratio(value: float | None, whole: float | None, *, higher_is_better: bool) -> float | None:
    """Divide a student's metric by its teacher's, or the teacher's by it where lower is better.

    So 1 is level with the teacher, and less is worse. None where it is undefined, as where the
    teacher's is not above 0: a part of "no better than chance", or worse, is no success however
    near to 1 it is.
    """
    if value is None or whole is None:
        return None
    if why_no_ratio(value, whole, higher_is_better=higher_is_better) is not None:
        return None
    return value / whole if higher_is_better else whole / value


def why_no_ratio(
    value: float | None,
    whole: float | None,
    metric: str = "metric",
    *,
    higher_is_better: bool,
) -> str | None:
    """Say in a clause why there is no retention; None where it is defined."""
    if whole is None or math.isnan(whole):
        return f"the teacher's {metric} is undefined"
    if value is None or math.isnan(value):
        return f"the student's {metric} is undefined"
    if whole <= 0:
        return (
            f"the teacher's {metric} is {whole:.4g}, and a part of what is not above 0 says nothing"
        )
    if value <= 0 and not higher_is_better:
        return f"the student's {metric} is {value:.4g}, and nothing can be divided by it"
    return None


def ratio_interval(
    low: float, high: float, whole: float | None, *, higher_is_better: bool
) -> tuple[float, float] | None:
    """Turn the interval of a student's metric minus its teacher's into one of the retention.

    The teacher is held fixed. None where the retention is undefined anywhere in it.
    """
    if whole is None:
        return None
    ends = [
        ratio(whole + end, whole, higher_is_better=higher_is_better)
        for end in ((low, high) if higher_is_better else (high, low))
    ]
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])
