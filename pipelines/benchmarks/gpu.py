"""Figures of a GPU, written as a page: layers, waits of the host, and steps of distillation."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.families import find_slots
from moe_dist.distributed.engine import build_engine
from moe_dist.distributed.update import Precision
from moe_dist.errors import ConfigError
from moe_dist.losses.total import CountKind, weighted_total
from moe_dist.measure.latency import random_batch, wait_for
from moe_dist.moe import Experts, MoELayer, RoutingContext, build_router, use_context
from moe_dist.router_spec import ROUTER_FACTS
from moe_dist.training.hardware import begin_peak_device_memory
from moe_dist.training.step import distill_terms, freeze

from .layer import LayerBenchmark, LayerTiming
from .layer import run as time_layers
from .models import random_classifier
from .sizes import below_one

_VOCAB_SIZE = 30_000
_NUM_WARMUPS = 2


@dataclass(frozen=True)
class GpuBenchmark:
    """What to measure.

    Args:
        num_tokens: of a layer's call.
        layer_width: of its hidden states, and neurons of an expert.
        layers: number of experts, and of a token's choices, of each layer.
        num_repeats: timed calls of a layer, and timed steps.
        batch_size: sentences in a step.
        seq_len: tokens of a sentence, none of them padding.
        d_model: width of the model that takes steps.
        num_layers: its depth.
        out: the page.
    """

    num_tokens: int = 4096
    layer_width: int = 768
    layers: tuple[tuple[int, int], ...] = ((4, 1), (8, 2), (32, 2))
    num_repeats: int = 20
    batch_size: int = 64
    seq_len: int = 128
    d_model: int = 384
    num_layers: int = 6
    out: Path = Path("docs/results/gpu.md")


@dataclass(frozen=True)
class StepTiming:
    """What steps of distillation took.

    Args:
        precision: "fp32" or "bf16".
        median_ms: of a step, teacher included.
        tokens_per_s: by that.
        peak_gib: the most that tensors took; None where the device does not tell.
    """

    precision: str
    median_ms: float
    tokens_per_s: float
    peak_gib: float | None


@dataclass(frozen=True)
class GpuReport:
    """What was measured.

    Args:
        device: the device and the versions, in words.
        layers: by experts and choices of a token, what forward and backward take.
        waits: by router how often the host waits in a bf16 layer, forward and backward; of a GPU.
        steps: of distillation.
    """

    device: str
    layers: dict[str, list[LayerTiming]]
    waits: dict[str, tuple[int, int]]
    steps: list[StepTiming]


def run(settings: GpuBenchmark, device: torch.device) -> GpuReport:
    """Measure on a device; a ConfigError if a setting does not fit."""
    faults = below_one(settings, "num_tokens", "num_repeats", "batch_size", "seq_len")
    if faults:
        raise ConfigError(faults, source="benchmark gpu")
    layers = {
        f"{num_experts} experts, top {top_k}": time_layers(
            LayerBenchmark(
                num_tokens=settings.num_tokens,
                d_model=settings.layer_width,
                expert_size=settings.layer_width,
                num_experts=num_experts,
                top_k=top_k,
                routers=("hash_random", "token_gate"),
                precisions=("bf16",),
                num_repeats=settings.num_repeats,
                backward=True,
                device=device.type,
            )
        )
        for num_experts, top_k in settings.layers
    }
    routers = [name for name, facts in ROUTER_FACTS.items() if not facts.merges]
    is_gpu = device.type == "cuda"
    return GpuReport(
        _describe(device),
        layers,
        {name: count_waits(name, device) for name in routers} if is_gpu else {},
        [_time_steps(settings, precision, device) for precision in ("fp32", "bf16")],
    )


def count_waits(router: str, device: torch.device) -> tuple[int, int]:
    """Count how often the host waits for the device in a bf16 layer's forward and backward."""
    gate = build_router(
        router,
        d_model=128,
        num_experts=8,
        top_k=2,
        vocab_size=_VOCAB_SIZE,
        token_counts=torch.ones(_VOCAB_SIZE),
        num_tasks=2,
    )
    layer = MoELayer(Experts(8, 128, 64, activation="gelu"), gate).to(device, torch.bfloat16)
    hidden = torch.randn(4, 64, 128).to(device, torch.bfloat16).requires_grad_()
    context = RoutingContext(
        torch.randint(_VOCAB_SIZE, (4, 64)).to(device), task_ids=torch.tensor([1])
    )

    def once() -> tuple[int, int]:
        with use_context(context), _waits() as forward:
            loss = layer(hidden).sum()
        with _waits() as backward:
            loss.backward()
        return len(forward), len(backward)

    once()  # Libraries are loaded, and kernels chosen.
    return once()


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Collect torch's warnings of waits within the block; they are there when it ends."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    # In this thread, whose warnings are recorded, backward too.
    with (
        torch.autograd.set_multithreading_enabled(False),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    messages = [str(one.message) for one in seen]
    found += [message for message in messages if "synchronizing CUDA operation" in message]


def _time_steps(settings: GpuBenchmark, precision: Precision, device: torch.device) -> StepTiming:
    # What was measured before took memory of its own.
    begin_peak_device_memory(device)
    dense = random_classifier(
        vocab_size=_VOCAB_SIZE,
        d_model=settings.d_model,
        num_layers=settings.num_layers,
        num_neurons=4 * settings.d_model,
        max_tokens=settings.seq_len,
    )
    plan = plan_partition(
        [torch.arange(float(slot.num_neurons)) for slot in find_slots(dense)],
        num_experts=4,
        expert_size=settings.d_model,
        num_shared_neurons=0,
    )
    student = dense_to_moe(dense, plan, router="token_gate")
    engine = build_engine(
        student,
        learning_rate=1e-4,
        weight_decay=0.01,
        num_steps=10_000,
        precision=precision,
        device=device,
    )
    compute = partial(distill_terms, teacher=freeze(dense).to(device), with_task=False)
    batch = random_batch(dense, settings.batch_size, settings.seq_len, device=device)
    num_tokens = settings.batch_size * settings.seq_len
    counts: dict[CountKind, int] = {"samples": settings.batch_size, "tokens": num_tokens}
    engine.module.train()
    seconds: list[float] = []
    for _ in range(settings.num_repeats + _NUM_WARMUPS):
        wait_for(device)
        start_s = time.perf_counter()
        with engine.autocast():
            terms = compute(engine.module, batch=batch).terms
            total, _ = weighted_total(terms, dict.fromkeys(terms, 1.0), counts)
        engine.backward(total, is_last_micro_batch=True)
        engine.step()
        wait_for(device)
        seconds.append(time.perf_counter() - start_s)
    median_s = statistics.median(seconds[_NUM_WARMUPS:])
    peak = torch.cuda.max_memory_allocated(device) / 1024**3 if device.type == "cuda" else None
    return StepTiming(precision, 1e3 * median_s, num_tokens / median_s, peak)


def _describe(device: torch.device) -> str:
    torch_version = f"torch {torch.__version__}"
    if device.type != "cuda":
        return f"no GPU, {torch_version}"
    facts = torch.cuda.get_device_properties(device)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return (
        f"{facts.name}, capability {capability}, {facts.total_memory / 1024**3:.0f} GiB, "
        f"{torch_version}, CUDA {torch.version.cuda}"
    )


def to_markdown(report: GpuReport, settings: GpuBenchmark) -> str:
    """Lay the figures out as a page."""
    lines = [
        "# On a GPU",
        "",
        f"{report.device}. Written by the second of these commands, after the tests of the first:",
        "",
        "```",
        "make test-gpu",
        f"moe-dist benchmark gpu --tokens {settings.num_tokens} --repeats {settings.num_repeats}",
        "```",
        "",
        f"Forward and backward of a layer, bf16, {settings.num_tokens} tokens of width "
        f"{settings.layer_width}, experts of {settings.layer_width}, against",
        "a dense FFN of the same active FLOPs, in turn; the ratio is the median over rounds.",
        "",
        *_table(
            ("layer", "router", "median ms", "fastest ms", "ratio to dense"),
            (
                (
                    layer,
                    timing.layer,
                    f"{timing.median_ms:.3f}",
                    f"{timing.fastest_ms:.3f}",
                    f"{timing.ratio:.2f}",
                )
                for layer, timings in report.layers.items()
                for timing in timings
            ),
        ),
        "",
        "How often the host waits for the GPU in a bf16 layer, as torch's sync debug mode sees it:",
        "",
        *_table(
            ("router", "forward", "backward"),
            ((name, *map(str, waits)) for name, waits in report.waits.items()),
        ),
        "",
        f"Steps of distillation: {settings.batch_size} sentences of {settings.seq_len} tokens, a "
        f"BERT of {settings.num_layers} layers of width",
        f"{settings.d_model}, random weights, 4 experts of {settings.d_model}; teacher included.",
        "",
        *_table(
            ("precision", "median ms", "tokens/s", "most memory of tensors, GiB"),
            (
                (
                    step.precision,
                    f"{step.median_ms:.1f}",
                    f"{step.tokens_per_s:,.0f}",
                    "" if step.peak_gib is None else f"{step.peak_gib:.2f}",
                )
                for step in report.steps
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


def main(settings: GpuBenchmark | None = None) -> None:
    """Measure, and write the page; without a GPU say so and write nothing."""
    settings = GpuBenchmark() if settings is None else settings
    console = Console(highlight=False)
    if not torch.cuda.is_available():
        console.print(f"no CUDA device here: nothing measured, {settings.out} not written")
        return
    report = run(settings, torch.device("cuda", torch.cuda.current_device()))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(to_markdown(report, settings), encoding="utf-8")
    console.print(f"{report.device}; figures in {settings.out}")
