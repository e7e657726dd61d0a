"""Time the MoE layer against a dense FFN of the same active FLOPs, interleaved in one run.

The whole layer is timed: router, permutation, grouped products and the way back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.measure.latency import wait_for
from moe_dist.moe import Experts, MoELayer, RoutingContext, build_router, use_context

from .sizes import below_one, cpu_threads

VOCAB_SIZE = 30_000
GOAL_RATIO = 1.15
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSE = "dense"


@dataclass(frozen=True)
class LayerBenchmark:
    """What to time. Defaults are the project's goal: 4096 tokens, 4 experts of 768, top-1.

    Args:
        num_tokens: tokens of one call.
        d_model: width of the hidden states.
        num_experts: experts of the layer.
        expert_size: neurons of one expert.
        top_k: experts for each token; the dense FFN has top_k * expert_size neurons.
        routers: names of the routers to time.
        precisions: "fp32", "bf16".
        num_repeats: timed calls of each layer, after one that is not timed.
        num_threads: CPU threads; torch's own choice if None.
        backward: time forward and backward instead of forward alone.
        device: "cpu" or "cuda"; an accelerator where there is one if None.
    """

    num_tokens: int = 4096
    d_model: int = 768
    num_experts: int = 4
    expert_size: int = 768
    top_k: int = 1
    routers: tuple[str, ...] = ("hash_random", "token_gate")
    precisions: tuple[str, ...] = ("fp32", "bf16")
    num_repeats: int = 9
    num_threads: int | None = None
    backward: bool = False
    device: str | None = None


@dataclass(frozen=True)
class LayerTiming:
    """One line of the result.

    Args:
        precision: "fp32" or "bf16".
        layer: "dense" or the router's name.
        median_ms: median over the repeats.
        fastest_ms: the fastest repeat.
        ratio: median over repeats of this layer's time to the dense layer's in the same round.
    """

    precision: str
    layer: str
    median_ms: float
    fastest_ms: float
    ratio: float


def run(settings: LayerBenchmark | None = None) -> list[LayerTiming]:
    """Time every layer once in each round, so that a busy machine slows all of them alike.

    For each precision the dense layer comes first, then one line for each router. A ConfigError
    if a setting does not fit.
    """
    settings = LayerBenchmark() if settings is None else settings
    _check(settings)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    timings: list[LayerTiming] = []
    with cpu_threads(settings.num_threads):
        for precision in settings.precisions:
            calls = _build_calls(settings, DTYPES[precision], device)
            seconds = _time_interleaved(calls, settings.num_repeats, device)
            dense = seconds[DENSE]
            for layer, own in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(own, dense, strict=True))
                median_ms, fastest_ms = 1e3 * statistics.median(own), 1e3 * min(own)
                timings.append(LayerTiming(precision, layer, median_ms, fastest_ms, ratio))
    return timings


def to_table(timings: Sequence[LayerTiming], settings: LayerBenchmark) -> Table:
    """Lay the timings out for the console."""
    passes = "forward and backward" if settings.backward else "forward"
    table = Table(
        title=f"{passes}, {settings.num_tokens} tokens, width {settings.d_model}, "
        f"{settings.num_experts} experts of {settings.expert_size}, top {settings.top_k}, "
        f"{settings.num_threads or torch.get_num_threads()} threads"
    )
    table.add_column("precision")
    table.add_column("layer")
    for column in ("median ms", "fastest ms", "ratio to dense"):
        table.add_column(column, justify="right")
    for timing in timings:
        table.add_row(
            timing.precision,
            timing.layer,
            f"{timing.median_ms:.2f}",
            f"{timing.fastest_ms:.2f}",
            f"{timing.ratio:.3f}",
        )
    return table


def main(settings: LayerBenchmark | None = None) -> None:
    """Run the benchmark and print its table; what `moe-dist benchmark layer` calls."""
    settings = LayerBenchmark() if settings is None else settings
    timings = run(settings)
    console = Console(highlight=False)
    console.print(to_table(timings, settings))
    worst = max(timing.ratio for timing in timings)
    verdict = "reached" if worst <= GOAL_RATIO else "missed"
    console.print(f"worst ratio {worst:.3f}; the goal of {GOAL_RATIO} is {verdict}")


def _check(settings: LayerBenchmark) -> None:
    faults = [
        f"precision {precision!r} is unknown; use {' or '.join(DTYPES)}"
        for precision in settings.precisions
        if precision not in DTYPES
    ]
    faults += below_one(settings, "num_tokens", "d_model", "expert_size", "num_repeats")
    if settings.num_threads is not None:
        faults += below_one(settings, "num_threads")
    if settings.num_experts < 2:
        faults.append(f"num_experts is {settings.num_experts}; routing needs at least 2")
    if faults:
        raise ConfigError(faults, source="benchmark layer")


def _build_calls(
    settings: LayerBenchmark, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    shape = (settings.num_tokens, settings.d_model)
    hidden_TD = torch.randn(shape, generator=generator).to(device, dtype)
    token_ids = torch.randint(VOCAB_SIZE, (settings.num_tokens,), generator=generator).to(device)
    context = RoutingContext(token_ids)
    width = settings.top_k * settings.expert_size
    layers: dict[str, nn.Module] = {
        DENSE: nn.Sequential(
            nn.Linear(settings.d_model, width), nn.GELU(), nn.Linear(width, settings.d_model)
        )
    }
    for name in settings.routers:
        router = build_router(
            name,
            d_model=settings.d_model,
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            vocab_size=VOCAB_SIZE,
            token_counts=torch.bincount(token_ids.cpu(), minlength=VOCAB_SIZE),
        )
        experts = Experts(
            settings.num_experts, settings.d_model, settings.expert_size, activation="gelu"
        )
        layers[name] = MoELayer(experts, router, name=name)
    return {
        name: _call(layer.to(device, dtype), hidden_TD, context, settings.backward)
        for name, layer in layers.items()
    }


def _call(
    layer: nn.Module, hidden_TD: Tensor, context: RoutingContext, backward: bool
) -> Callable[[], None]:
    grad_TD = torch.ones_like(hidden_TD)

    def forward_only() -> None:
        with torch.inference_mode(), use_context(context):
            layer(hidden_TD)

    def forward_and_backward() -> None:
        layer.zero_grad(set_to_none=True)
        with use_context(context):
            layer(hidden_TD.detach().requires_grad_()).backward(grad_TD)

    return forward_and_backward if backward else forward_only


def _time_interleaved(
    calls: dict[str, Callable[[], None]], num_repeats: int, device: torch.device
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(num_repeats + 1):
        for name, call in calls.items():
            wait_for(device)
            start_s = time.perf_counter()
            call()
            wait_for(device)
            if round_number:
                seconds[name].append(time.perf_counter() - start_s)
    return seconds
