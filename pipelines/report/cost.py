"""What models cost: parameters, FLOPs, and time on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.measure.latency import Latency, Rounds

    from ..chain.stage import StageWork

LATENCY_BATCH_SIZES = (1, 32)
LATENCY_SEQ_LEN = 128
LATENCY_ROUNDS = 10
MIN_LATENCY_ROUNDS = 3
LATENCY_BUDGET_S = 20.0
LATENCY_REPEATS = 2


def measure_cost(
    loaded: Mapping[str, Any], seq_len: int, stage: StageWork
) -> dict[str, dict[str, Any]]:
    """Count parameters and FLOPs, and time all models in turn in this process.

    Args:
        loaded: model by name.
        seq_len: tokens per sequence.
        stage: the stage that asks.

    Returns:
        For each model `shape`, `parameters`, `flops_per_token`, `ffn_flops_per_token`, and by batch
        size `latency_ms` (the median), `latency_low_ms` and `latency_spread`.
    """
    from moe_dist.measure.latency import measure_in_turn
    from moe_dist.measure.profile import count_parameters, flops_per_token, model_shape

    timed = measure_in_turn(
        loaded,
        latency_rounds(),
        batch_sizes=LATENCY_BATCH_SIZES,
        seq_len=seq_len,
        progress=stage.console.progress,
    )
    costs: dict[str, dict[str, Any]] = {}
    for name, model in loaded.items():
        parameters = count_parameters(model)
        flops = flops_per_token(model, seq_len)
        costs[name] = {
            "shape": model_shape(model),
            "parameters": {"total": parameters.total, "active": parameters.active},
            "flops_per_token": flops.total,
            "ffn_flops_per_token": flops.ffn,
            "latency_ms": _by_size(timed[name], "median_ms"),
            "latency_low_ms": _by_size(timed[name], "low_ms"),
            "latency_spread": _by_size(timed[name], "spread"),
        }
    return costs


def _by_size(timed: Mapping[int, Latency], figure: str) -> dict[str, float]:
    return {str(size): round(getattr(one, figure), 3) for size, one in timed.items()}


def latency_rounds() -> Rounds:
    """Say how often models are timed for a report."""
    from moe_dist.measure.latency import Rounds

    return Rounds(
        LATENCY_ROUNDS, MIN_LATENCY_ROUNDS, LATENCY_BUDGET_S, LATENCY_REPEATS, num_warmups=1
    )
