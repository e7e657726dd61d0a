"""Time the expert-parallel layer against DeepSpeed's own and against its multiplies alone.

Two CPU processes (gloo, one thread each) hold half of the experts each. All three
ways see the same tokens, weights and gate decisions, forward and backward, taking turns in one
run; a round's time is that of the slower process. The floor is one plain feed-forward network for
each expert on the rows that its rank gets, already grouped: no gate, no permutation, no
communication.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_dist.distributed import spawn_gloo
from moe_dist.errors import ConfigError

from .sizes import below_one

OURS, DEEPSPEED, FLOOR = "moe-dist", "DeepSpeed", "floor"
GOAL_OVER_FLOOR = 1.15
# Hot expert's share over the others': how many times faster than DeepSpeed.
GOALS_OVER_DEEPSPEED = {1: 1.2, 4: 2.3, 8: 2.9}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExpertParallelBenchmark:
    """What to time. Defaults are the project's goal.

    Args:
        num_tokens: tokens of each rank.
        d_model: width of the hidden states.
        expert_size: neurons of one expert.
        num_experts: experts over all ranks.
        ep_size: ranks, one thread each.
        loads: how many times the others' share the first expert draws.
        num_repeats: timed calls of each way, after one that is not timed.
    """

    num_tokens: int = 2048
    d_model: int = 768
    expert_size: int = 768
    num_experts: int = 8
    ep_size: int = 2
    loads: tuple[int, ...] = (1, 4, 8)
    num_repeats: int = 15


@dataclass(frozen=True)
class ExpertParallelTiming:
    """One line of the result.

    Args:
        load: the first expert's share over that of each other expert.
        layer: "moe-dist", "DeepSpeed" or "floor".
        median_ms: median over rounds, forward and backward, of the slower rank.
        over_floor: median over rounds of the time divided by the floor's in the same round.
        speedup: median over rounds of DeepSpeed's time divided by this one's.
        max_difference: largest difference of outputs and gradients to DeepSpeed's, relative to
            the largest value; 0 for DeepSpeed itself and the floor.
        sent_bytes: counted by the dispatch of all ranks: out and home, forward and backward.
        leaving_bytes: 4 x tokens that leave their rank x width x element size.
    """

    load: int
    layer: str
    median_ms: float
    over_floor: float
    speedup: float
    max_difference: float
    sent_bytes: int
    leaving_bytes: int


def run(settings: ExpertParallelBenchmark | None = None) -> list[ExpertParallelTiming]:
    """Start the processes and time every way once a round; three lines for each load.

    A ConfigError if a setting does not fit.
    """
    settings = ExpertParallelBenchmark() if settings is None else settings
    _check(settings)
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as name:
        spawn_gloo(_run_rank, settings.ep_size, settings, Path(name))
        ranks = [
            json.loads((Path(name) / f"rank{rank}.json").read_text(encoding="utf-8"))
            for rank in range(settings.ep_size)
        ]
    return [
        timing
        for index, load in enumerate(settings.loads)
        for timing in _timings(load, [rank[index] for rank in ranks])
    ]


def to_table(timings: Sequence[ExpertParallelTiming], settings: ExpertParallelBenchmark) -> Table:
    """Lay the timings out for the console."""
    table = Table(
        title=f"forward and backward, ep {settings.ep_size}, {settings.num_tokens} tokens a rank, "
        f"{settings.d_model}→{settings.expert_size}→{settings.d_model}, "
        f"{settings.num_experts} experts, top 1, fp32, one thread a rank"
    )
    table.add_column("hot expert")
    table.add_column("layer")
    for column in ("median ms", "× floor", "DeepSpeed ÷ it", "difference", "MB sent"):
        table.add_column(column, justify="right")
    for timing in timings:
        table.add_row(
            "balanced" if timing.load == 1 else f"{timing.load} ×",
            timing.layer,
            f"{timing.median_ms:.1f}",
            f"{timing.over_floor:.3f}",
            f"{timing.speedup:.2f}",
            f"{timing.max_difference:.0e}" if timing.layer == OURS else "",
            f"{timing.sent_bytes / 1e6:.1f}" if timing.layer == OURS else "",
        )
    return table


def main(settings: ExpertParallelBenchmark | None = None) -> None:
    """Run the benchmark and print its table; what `moe-dist benchmark expert-parallel` calls."""
    settings = ExpertParallelBenchmark() if settings is None else settings
    timings = run(settings)
    console = Console(highlight=False)
    console.print(to_table(timings, settings))
    for timing in timings:
        if timing.layer == OURS:
            console.print(_verdict(timing))


def _verdict(timing: ExpertParallelTiming) -> str:
    exact = timing.sent_bytes == timing.leaving_bytes
    goals = [
        (
            f"{timing.over_floor:.3f} × floor (goal {GOAL_OVER_FLOOR})",
            timing.over_floor <= GOAL_OVER_FLOOR,
        ),
        (
            f"outputs and gradients differ by {timing.max_difference:.0e} (goal {TOLERANCE:.0e})",
            timing.max_difference <= TOLERANCE,
        ),
        (f"{timing.sent_bytes:,} of {timing.leaving_bytes:,} leaving bytes sent", exact),
    ]
    if timing.load in GOALS_OVER_DEEPSPEED:
        goal = GOALS_OVER_DEEPSPEED[timing.load]
        goals.insert(1, (f"{timing.speedup:.2f} × DeepSpeed (goal {goal})", timing.speedup >= goal))
    said = [f"{text}: {'reached' if met else 'missed'}" for text, met in goals]
    return f"{'balanced' if timing.load == 1 else f'{timing.load} ×'}: " + "; ".join(said)


def _check(settings: ExpertParallelBenchmark) -> None:
    faults = below_one(settings, "num_tokens", "d_model", "expert_size", "num_repeats")
    if settings.ep_size < 2:
        faults.append(f"ep_size is {settings.ep_size}; there is nothing to exchange below 2")
    elif settings.num_experts < 1 or settings.num_experts % settings.ep_size:
        faults.append(
            f"num_experts is {settings.num_experts}; it must be a multiple of {settings.ep_size}"
        )
    if settings.num_experts > settings.d_model:
        faults.append(f"d_model is {settings.d_model}; the gate needs one column for each expert")
    if not settings.loads or min(settings.loads) < 1:
        faults.append(f"loads are {settings.loads}; give at least one, none below 1")
    if faults:
        raise ConfigError(faults, source="benchmark expert-parallel")


def _run_rank(
    rank: int, world_size: int, settings: ExpertParallelBenchmark, directory: Path
) -> None:
    from .expert_parallel_rank import Sizes, measure

    del world_size
    torch.set_num_threads(1)
    sizes = Sizes(settings.num_tokens, settings.d_model, settings.expert_size, settings.num_experts)
    measured = [measure(sizes, load, settings.num_repeats) for load in settings.loads]
    (directory / f"rank{rank}.json").write_text(json.dumps(measured), encoding="utf-8")


def _timings(load: int, ranks: list[dict[str, Any]]) -> list[ExpertParallelTiming]:
    """Turn what the ranks measured for one load into lines; their times are the same."""
    seconds: dict[str, list[float]] = ranks[0]["seconds"]
    timings = []
    for layer, own in seconds.items():
        ours = layer == OURS
        timings.append(
            ExpertParallelTiming(
                load=load,
                layer=layer,
                median_ms=1e3 * statistics.median(own),
                over_floor=_median_ratio(own, seconds[FLOOR]),
                speedup=_median_ratio(seconds[DEEPSPEED], own),
                max_difference=max(rank["max_difference"] for rank in ranks) if ours else 0.0,
                sent_bytes=sum(rank["sent_bytes"] for rank in ranks) if ours else 0,
                # Out and home again, forward and backward.
                leaving_bytes=4 * sum(rank["leaving_bytes"] for rank in ranks),
            )
        )
    return timings


def _median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))
