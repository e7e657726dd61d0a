"""Time the MoE layer against that of transformers, with each of its ways to compute experts.

Both have the same weights, router included, and are given the same hidden states, in turn. These
are drawn anew for each round, so that experts get other numbers of tokens, as in training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.inference.backends.native import load_operators
from moe_dist.measure.free_memory import free_memory
from moe_dist.measure.latency import wait_for, watch_other_work
from moe_dist.measure.screening import relative_error
from moe_dist.moe import Experts, MoELayer, build_router

from ..markdown import markdown_table
from .results import busy_line, check_output, write_results
from .sizes import below_one, cpu_threads

OURS = "moe-dist"
BACKENDS = ("eager", "batched_mm", "grouped_mm")
"""Those of transformers that need nothing but torch."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = {"forward": False, "forward and backward": True}
GOALS = {8: 1.0, 32: 1.2}
"""By number of experts, how many times as fast as the best of the backends."""
TOLERANCES = {"fp32": 1e-5, "bf16": 0.02}
"""Of answers and gradients, see `relative_error`."""
OPTIONS = {"num_tokens": "--tokens", "num_rounds": "--rounds", "num_threads": "--threads"}


@dataclass(frozen=True)
class ExpertsBenchmark:
    """What to time.

    Args:
        num_tokens: of one call.
        d_model: width of the hidden states.
        expert_size: neurons of one expert, gated.
        num_experts: of the layers.
        top_k: experts of each token; two at least, since with one transformers weighs by 1.
        precisions: "fp32", "bf16".
        num_rounds: in each every layer is timed once, after one that is not timed.
        num_threads: CPU threads; torch's own choice if None.
        device: "cpu" or "cuda"; an accelerator where there is one if None.
    """

    num_tokens: int = 4096
    d_model: int = 768
    expert_size: int = 768
    num_experts: tuple[int, ...] = tuple(GOALS)
    top_k: int = 2
    precisions: tuple[str, ...] = tuple(DTYPES)
    num_rounds: int = 7
    num_threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Case:
    """What is timed together.

    Args:
        num_experts: of the layer.
        precision: "fp32" or "bf16".
        passes: a key of `PASSES`.
    """

    num_experts: int
    precision: str
    passes: str


@dataclass(frozen=True)
class ExpertsTiming:
    """One layer's times.

    Attributes:
        case: among which others it was timed.
        layer: `OURS`, or a backend of transformers.
        median_ms: over the rounds.
        fastest_ms: the fastest round.
        speed: its time over ours, the median over the rounds: ours is so many times as fast.
        error: how far its outputs and gradients lie from ours, see `relative_error`.
    """

    case: Case
    layer: str
    median_ms: float
    fastest_ms: float
    speed: float
    error: float


@dataclass(frozen=True)
class ExpertsReport:
    """What was found.

    Attributes:
        timings: of every case, ours first.
        left_out: backends that were not timed, each with the reason.
        num_threads: CPU threads.
        versions: of torch and transformers.
        busy: what else the machine did, where that was too much to judge by.
    """

    timings: tuple[ExpertsTiming, ...]
    left_out: tuple[str, ...]
    num_threads: int
    versions: str
    busy: str

    def best(self) -> list[ExpertsTiming]:
        """Of each case the backend of transformers that takes the least time."""
        found: dict[Case, ExpertsTiming] = {}
        for one in self.timings:
            known = found.get(one.case)
            if one.layer != OURS and (known is None or one.median_ms < known.median_ms):
                found[one.case] = one
        return list(found.values())


def run(settings: ExpertsBenchmark) -> ExpertsReport:
    """Time all cases; a ConfigError if a setting does not fit."""
    import transformers

    _check(settings)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        # As jobs do before they train.
        load_operators()
    timings: list[ExpertsTiming] = []
    left_out: list[str] = []
    with cpu_threads(settings.num_threads), watch_other_work() as look:
        num_threads = torch.get_num_threads()
        for num_experts in settings.num_experts:
            for precision in settings.precisions:
                pair = _Pair(settings, num_experts, DTYPES[precision], device)
                for passes in PASSES:
                    case = Case(num_experts, precision, passes)
                    timings += _time(pair, case, settings, left_out)
        work = look()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    busy = busy_line(work, num_threads)
    return ExpertsReport(tuple(timings), tuple(left_out), num_threads, versions, busy)


class _Pair:
    """Our layer and that of transformers, with the same weights.

    Args:
        settings: sizes.
        num_experts: of both.
        dtype: of both.
        device: where they are.
    """

    def __init__(
        self,
        settings: ExpertsBenchmark,
        num_experts: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        torch.manual_seed(0)
        width, top_k = settings.d_model, settings.top_k
        gate = build_router("token_gate", d_model=width, num_experts=num_experts, top_k=top_k)
        experts = Experts(
            num_experts,
            width,
            settings.expert_size,
            activation="silu",
            gated=True,
            bias_in=False,
            bias_out=False,
        )
        self.own = MoELayer(experts, gate)
        self._config = MixtralConfig(
            hidden_size=width,
            intermediate_size=settings.expert_size,
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
        )
        self.other: Any = MixtralSparseMoeBlock(self._config)
        with torch.no_grad():
            # Scores as far apart as those of a trained gate.
            gate.get_parameter("gate.weight").normal_(std=width**-0.5)
            values = self._own_as_theirs(lambda parameter: parameter)
            for parameter, value in zip(self._theirs(), values, strict=True):
                parameter.copy_(value)
        for block in (self.own, self.other):
            block.to(device, dtype)
        self._shape = (1, settings.num_tokens, width)
        self.device, self.dtype = device, dtype

    def hidden(self, seed: int) -> tuple[Tensor, Tensor]:
        """Draw hidden states, and the gradient of what is made of them."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(self._shape, generator=generator) for _ in range(2))
        given, grad = (one.to(self.device, self.dtype) for one in drawn)
        return given, grad

    def call(self, layer: str, given: Tensor, grad: Tensor | None) -> Tensor:
        """Make a forward pass, and a backward pass where there is a gradient."""
        block: nn.Module = self.own
        if layer != OURS:
            block, self._config._experts_implementation = self.other, layer
        if grad is None:
            with torch.inference_mode():
                return block(given)
        block.zero_grad(set_to_none=True)
        out: Tensor = block(given)
        out.backward(grad)
        return out

    def results(self, layer: str, given: Tensor, grad: Tensor | None) -> list[Tensor]:
        """Outputs, and the gradients of hidden states and weights if there are any."""
        if grad is None:
            return [self.call(layer, given, None)]
        own = given.detach().requires_grad_()
        out = self.call(layer, own, grad)
        weights = (
            self._own_as_theirs(_gradient)
            if layer == OURS
            else [_gradient(one) for one in self._theirs()]
        )
        return [out.detach(), _gradient(own), *weights]

    def _theirs(self) -> list[nn.Parameter]:
        found = dict(self.other.named_parameters())
        return [found[f"experts.{name}_proj"] for name in ("down", "gate_up")] + [
            found["gate.weight"]
        ]

    def _own_as_theirs(self, read: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
        """Our weights, or their gradients, as `_theirs` has them."""
        own = {name: read(one) for name, one in self.own.named_parameters()}
        into = torch.cat([own["experts.w_gate"], own["experts.w_in"]], dim=1)
        return [own["experts.w_out"], into, own["router.gate.weight"]]


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _time(
    pair: _Pair, case: Case, settings: ExpertsBenchmark, left_out: list[str]
) -> list[ExpertsTiming]:
    learns = PASSES[case.passes]
    errors = {OURS: 0.0}
    for backend in BACKENDS:
        try:
            _see_that_it_fits(backend, pair, settings, learns=learns)
            errors[backend] = _compare(pair, backend, case)
        except ConfigError as fault:
            where = f"{case.num_experts} experts, {case.precision}, {case.passes}"
            left_out.append(f"{backend} of {where}: {'; '.join(fault.faults)}")
    seconds: dict[str, list[float]] = {layer: [] for layer in errors}
    for number in range(settings.num_rounds + 1):
        given, grad = pair.hidden(1 + number)
        for layer, own in seconds.items():
            start = given.detach().requires_grad_(learns)
            wait_for(pair.device)
            start_s = time.perf_counter()
            pair.call(layer, start, grad if learns else None)
            wait_for(pair.device)
            if number:
                own.append(time.perf_counter() - start_s)
    ours = seconds[OURS]
    return [
        ExpertsTiming(
            case,
            layer,
            1e3 * statistics.median(own),
            1e3 * min(own),
            statistics.median(a / b for a, b in zip(own, ours, strict=True)),
            errors[layer],
        )
        for layer, own in seconds.items()
    ]


def _compare(pair: _Pair, backend: str, case: Case) -> float:
    """Tell how far results lie apart; too far is a ConfigError."""
    given, grad = pair.hidden(0)
    expected, found = (
        pair.results(layer, given, grad if PASSES[case.passes] else None)
        for layer in (OURS, backend)
    )
    error = max(relative_error([a], [b]) for a, b in zip(found, expected, strict=True))
    if not error <= TOLERANCES[case.precision]:
        raise ConfigError([f"its results lie {error:.1g} of their length from ours"])
    return error


def _see_that_it_fits(
    backend: str, pair: _Pair, settings: ExpertsBenchmark, *, learns: bool
) -> None:
    """Refuse `batched_mm`, which copies weights for each token, where these are many."""
    if backend != "batched_mm":
        return
    num_slots = settings.num_tokens * settings.top_k
    numbers = num_slots * 3 * settings.expert_size * settings.d_model * (2 if learns else 1)
    size, free = numbers * pair.dtype.itemsize, free_memory(pair.device)
    if size > free / 2:
        raise ConfigError(
            [
                f"its copies of weights take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
                "are free"
            ]
        )


def _check(settings: ExpertsBenchmark) -> None:
    faults = [
        f"precision {precision!r} is unknown; use {' or '.join(DTYPES)}"
        for precision in settings.precisions
        if precision not in DTYPES
    ]
    faults += below_one(
        settings, "num_tokens", "d_model", "expert_size", "num_rounds", called=OPTIONS
    )
    if settings.num_threads is not None:
        faults += below_one(settings, "num_threads", called=OPTIONS)
    if settings.top_k < 2:
        faults.append(f"--top-k is {settings.top_k}; it must be at least 2")
    faults += [
        f"--experts is {number}; it must be above --top-k {settings.top_k}"
        for number in settings.num_experts
        if number <= settings.top_k
    ]
    if faults:
        raise ConfigError(faults, source="benchmark experts")


COLUMNS = (
    *("experts", "precision", "passes", "layer", "median ms", "fastest ms"),
    *("ours is faster by", "difference"),
)


def to_rows(timings: Sequence[ExpertsTiming]) -> list[tuple[str, ...]]:
    """Lay timings out in `COLUMNS`."""
    return [
        (
            str(one.case.num_experts),
            one.case.precision,
            one.case.passes,
            one.layer,
            f"{one.median_ms:.1f}",
            f"{one.fastest_ms:.1f}",
            f"{one.speed:.2f} x",
            f"{one.error:.0e}" if one.error else "0",
        )
        for one in timings
    ]


def verdicts(report: ExpertsReport) -> list[str]:
    """Say how fast ours is beside the best backend of each case, and what disturbs that."""
    lines = []
    for one in report.best():
        case, goal = one.case, GOALS.get(one.case.num_experts)
        reached = "reached" if goal is not None and one.speed >= goal else "missed"
        said = "" if goal is None else f"; the goal of {goal:g} x is {reached}"
        lines.append(
            f"{case.num_experts} experts, {case.precision}, {case.passes}: {one.speed:.2f} x as "
            f"fast as {one.layer}, the best of transformers{said}"
        )
    lines += [f"left out: {line}" for line in report.left_out]
    return [*lines, *([report.busy] if report.busy else [])]


def describe(report: ExpertsReport, settings: ExpertsBenchmark) -> str:
    """Say what was timed, in a line."""
    return (
        f"{settings.num_tokens} tokens of width {settings.d_model}, gated experts of "
        f"{settings.expert_size}, top {settings.top_k}, {report.num_threads} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {report.versions}"
    )


def to_markdown(report: ExpertsReport, settings: ExpertsBenchmark) -> str:
    """Lay the report out as a page."""
    lines = [
        "# The MoE layer beside that of transformers",
        "",
        f"{describe(report, settings)}.",
        "",
        *markdown_table(COLUMNS, to_rows(report.timings)),
        "",
        *(f"- {line}" for line in verdicts(report)),
    ]
    return "\n".join(lines) + "\n"


def main(settings: ExpertsBenchmark, output: Path | None = None) -> None:
    """Run the benchmark and print it; `output` is a directory for JSON and Markdown."""
    check_output(output)
    report = run(settings)
    console = Console(highlight=False)
    table = Table(title=describe(report, settings))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in to_rows(report.timings):
        table.add_row(*row)
    console.print(table)
    for line in verdicts(report):
        console.print(line)
    if output is not None:
        write_results(output, "experts", report, to_markdown(report, settings))
