"""At which steps a trial is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_dist.config import SearchConfig


def rung_times(search: SearchConfig) -> tuple[int, ...]:
    """List a trial's rungs: 1, F, F² … for the schedulers that halve, else 1, 2, 3 …."""
    if search.chosen_scheduler in ("asha", "hyperband"):
        return tuple(search.reduction_factor**power for power in range(search.rungs))
    return tuple(range(1, search.rungs + 1))


def rung_steps(times: tuple[int, ...], num_steps: int) -> dict[int, int]:
    """Place the rungs on a training's steps; of rungs that fall on one step the later counts."""
    return {max(1, round(num_steps * time / times[-1])): time for time in times}
