"""What K experts cost where they are merged: FLOPs, time and memory against two other ways.

The plain mixture applies K experts to each token. The naive merge makes a weight of its own for
every sequence, as the method's public code does (2023.emnlp-main.907). FLOPs are those of BERT-base
with its language-modelling head on one text of 128 tokens, which the published figures are of; one
feed-forward layer is counted and taken as often as there are. Time and memory are of one layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.errors import ConfigError
from moe_dist.measure.latency import wait_for
from moe_dist.moe import Experts, MergedLayer, MoELayer, RoutingContext, build_router, use_context
from moe_dist.moe.merge import Merges, applying_is_cheaper
from moe_dist.moe.routing import current_context

from ..markdown import markdown_table
from .live_memory import LiveMemory
from .models import random_language_model
from .results import write_results
from .sizes import below_one, cpu_threads

PLAIN, NAIVE = "plain mixture", "naive merge"
MERGED = ("merged_sequence", "merged_task")
SLOWER_GOAL, FASTER_GOAL = 1.3, 3.0
PUBLISHED = {"plain": {1: 28.5, 4: 72.0, 32: 480.0}, "merged": {1: 28.5, 4: 28.6, 32: 30.5}}
"""GFLOPs of MEO's paper, by K."""


@dataclass(frozen=True)
class MergeBenchmark:
    """What to count and to time. Defaults are BERT-base and the project's goal.

    Args:
        d_model: width of the hidden states.
        expert_size: neurons of one expert.
        num_layers: feed-forward layers of the model whose FLOPs are counted.
        vocab_size: of that model.
        flop_top_ks: K of the FLOPs; there are as many experts as the largest.
        flop_tokens: tokens of its one text.
        num_experts: experts of the layer that is timed.
        time_top_ks: K of the times.
        batch_size: sequences of one call.
        seq_lens: tokens of each.
        backward: time forward and backward instead of forward alone.
        num_repeats: timed calls, after one that is not timed.
        num_threads: CPU threads; torch's own choice if None.
        device: "cpu" or "cuda"; an accelerator where there is one if None.
    """

    d_model: int = 768
    expert_size: int = 3072
    num_layers: int = 12
    vocab_size: int = 30_522
    flop_top_ks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    flop_tokens: int = 128
    num_experts: int = 8
    time_top_ks: tuple[int, ...] = (1, 8)
    batch_size: int = 8
    seq_lens: tuple[int, ...] = (128, 16)
    backward: bool = False
    num_repeats: int = 7
    num_threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class MergeFlops:
    """GFLOPs of the whole model for one text.

    Args:
        top_k: K.
        plain: K experts for each token.
        merged: K experts merged for the text.
    """

    top_k: int
    plain: float
    merged: float


@dataclass(frozen=True)
class MergeTiming:
    """One way at one size.

    Args:
        seq_len: tokens of a sequence.
        top_k: K.
        way: "plain mixture", "naive merge", or the router of merged experts.
        median_ms: median over the repeats.
        ratio: median over repeats of this way's time to the plain mixture's in the same round.
        peak_mib: what tensors took at most beside parameters and input.
        applies: merged experts are applied to each token, which so few tokens make cheaper.
    """

    seq_len: int
    top_k: int
    way: str
    median_ms: float
    ratio: float
    peak_mib: float
    applies: bool = False


@dataclass(frozen=True)
class MergeReport:
    """What was found, and of what.

    Args:
        settings: what was asked for.
        num_threads: CPU threads that torch used.
        device: where.
        flops: by K.
        timings: one for each length, K and way.
    """

    settings: MergeBenchmark
    num_threads: int
    device: str
    flops: tuple[MergeFlops, ...]
    timings: tuple[MergeTiming, ...]

    def time_ms(self, way: str, top_k: int, seq_len: int) -> float:
        """Look up a median."""
        (found,) = (
            one.median_ms
            for one in self.timings
            if (one.way, one.top_k, one.seq_len) == (way, top_k, seq_len)
        )
        return found


def run(settings: MergeBenchmark | None = None) -> MergeReport:
    """Count the FLOPs, then time all ways in turn, so that a busy machine slows them alike.

    A ConfigError if a setting does not fit.
    """
    settings = MergeBenchmark() if settings is None else settings
    _check(settings)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with cpu_threads(settings.num_threads):
        flops = count_flops(settings)
        timings = [
            timing
            for seq_len in settings.seq_lens
            for timing in _time_ways(settings, seq_len, device)
        ]
        return MergeReport(
            settings, torch.get_num_threads(), device.type, tuple(flops), tuple(timings)
        )


def count_flops(settings: MergeBenchmark) -> list[MergeFlops]:
    """Count GFLOPs of one text by K, with `torch.utils.flop_counter`."""
    rest = _flops_without_ffns(settings)
    most = max(settings.flop_top_ks)
    experts = _experts(settings, most)
    hidden_BSD, context = _texts(settings, 1, settings.flop_tokens, torch.device("cpu"))
    found = []
    for top_k in settings.flop_top_ks:
        plain, merged = (
            rest
            + settings.num_layers * _counted(_layer(experts, router, top_k), hidden_BSD, context)
            for router in ("token_gate", "merged_sequence")
        )
        found.append(MergeFlops(top_k, plain / 1e9, merged / 1e9))
    return found


def to_tables(report: MergeReport) -> list[Table]:
    """Lay the result out for the console."""
    settings = report.settings
    passes = "forward and backward" if settings.backward else "forward"
    titles = (
        f"GFLOPs, {settings.num_layers} layers of width {settings.d_model}, one text of "
        f"{settings.flop_tokens} tokens",
        f"{passes} of one layer, {settings.num_experts} experts of {settings.expert_size}, batch "
        f"{settings.batch_size}, {report.num_threads} threads, {report.device}",
    )
    tables = []
    for title, (head, rows) in zip(titles, _content(report), strict=True):
        table = Table(title=title)
        for heading in head:
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def to_markdown(report: MergeReport) -> str:
    """Write the same for people, in Markdown."""
    lines = []
    for table, (head, rows) in zip(to_tables(report), _content(report), strict=True):
        lines += [f"{table.title}.", "", *markdown_table(head, rows), ""]
    return "\n".join([*lines, *(f"- {sentence}." for sentence in verdicts(report)), ""])


def verdicts(report: MergeReport) -> list[str]:
    """Compare with the project's goals, where the sizes that these are of were timed."""
    settings = report.settings
    low, high, length = 1, 8, 128
    if not ({low, high} <= set(settings.time_top_ks) and length in settings.seq_lens):
        return []
    merged, plain = MERGED[0], report.time_ms(PLAIN, high, length)
    own = report.time_ms(merged, high, length)
    slower, faster = own / report.time_ms(merged, low, length), plain / own
    return [
        f"{merged}, K={high}: {slower:.2f} × its own time at K={low}; the goal of at most "
        f"{SLOWER_GOAL} is {'reached' if slower <= SLOWER_GOAL else 'missed'}",
        f"{merged}, K={high}: {faster:.2f} × faster than the plain mixture; the goal of at least "
        f"{FASTER_GOAL:.0f} is {'reached' if faster >= FASTER_GOAL else 'missed'}",
    ]


def main(settings: MergeBenchmark | None = None, output: Path | None = None) -> None:
    """Run the benchmark and print it; what `moe-dist benchmark merge` calls.

    Args:
        settings: what to measure; the defaults if None.
        output: a directory for the same as JSON and Markdown.
    """
    report = run(settings)
    console = Console(highlight=False)
    for table in to_tables(report):
        console.print(table)
    for sentence in verdicts(report):
        console.print(sentence)
    if output is not None:
        write_results(output, "merge", report, to_markdown(report))


def _content(report: MergeReport) -> list[tuple[list[str], list[list[str]]]]:
    flops = [
        [
            str(one.top_k),
            f"{one.plain:.1f}",
            f"{one.merged:.1f}",
            *(
                f"{value:.1f}" if (value := PUBLISHED[kind].get(one.top_k)) else ""
                for kind in ("plain", "merged")
            ),
        ]
        for one in report.flops
    ]
    timings = [
        [
            str(one.seq_len),
            str(one.top_k),
            one.way + (" (applied)" if one.applies else ""),
            f"{one.median_ms:.2f}",
            f"{one.ratio:.3f}",
            f"{one.peak_mib:.1f}",
        ]
        for one in report.timings
    ]
    return [
        (["K", "plain", "merged", "published: plain", "merged"], flops),
        (["tokens", "K", "way", "median ms", "over plain", "peak MiB"], timings),
    ]


def _check(settings: MergeBenchmark) -> None:
    names = ("d_model", "expert_size", "num_layers", "flop_tokens", "batch_size", "num_repeats")
    faults = below_one(settings, *names)
    if settings.num_threads is not None:
        faults += below_one(settings, "num_threads")
    if settings.num_experts < 2:
        faults.append(f"num_experts is {settings.num_experts}; merging needs at least 2")
    for name in ("flop_top_ks", "time_top_ks", "seq_lens"):
        values = getattr(settings, name)
        if not values or min(values) < 1:
            faults.append(f"{name} is {list(values)}; give numbers of at least 1")
    if settings.flop_top_ks and max(settings.flop_top_ks) < 2:
        faults.append("flop_top_ks has no number above 1, with which there is nothing to merge")
    if settings.time_top_ks and max(settings.time_top_ks) > settings.num_experts:
        faults.append(
            f"time_top_ks asks for {max(settings.time_top_ks)} of {settings.num_experts} experts"
        )
    if faults:
        raise ConfigError(faults, source="benchmark merge")


def _experts(settings: MergeBenchmark, num_experts: int) -> Experts:
    return Experts(num_experts, settings.d_model, settings.expert_size, activation="gelu")


def _layer(experts: Experts, router: str, top_k: int) -> MoELayer:
    """A layer of these experts, whose gates tell the sequences apart."""
    gate = build_router(
        router,
        d_model=experts.d_model,
        num_experts=experts.num_experts,
        top_k=top_k,
        num_tasks=1,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in gate.named_parameters():
        if name.endswith("gate.weight"):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    kind = MergedLayer if router in MERGED else MoELayer
    return kind(experts, gate, name=router).eval()


def _texts(
    settings: MergeBenchmark, batch_size: int, seq_len: int, device: torch.device
) -> tuple[Tensor, RoutingContext]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, seq_len, settings.d_model)
    hidden_BSD = torch.randn(shape, generator=generator).to(device)
    return hidden_BSD, RoutingContext(mask=torch.ones(shape[:2], dtype=torch.bool, device=device))


def _counted(layer: nn.Module, hidden_BSD: Tensor, context: RoutingContext) -> float:
    with torch.no_grad(), use_context(context), FlopCounterMode(display=False) as counter:
        layer(hidden_BSD)
    return float(counter.get_total_flops())


def _flops_without_ffns(settings: MergeBenchmark) -> float:
    """Count a dense BERT's FLOPs on shapes alone, and take those of its FFNs away."""
    with torch.device("meta"):
        model = random_language_model(
            vocab_size=settings.vocab_size,
            d_model=settings.d_model,
            num_layers=settings.num_layers,
            num_neurons=settings.expert_size,
            max_tokens=settings.flop_tokens,
        )
        ids = torch.zeros(1, settings.flop_tokens, dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids)
    products = 2 * settings.d_model * settings.expert_size
    return float(
        counter.get_total_flops() - settings.num_layers * settings.flop_tokens * 2 * products
    )


def _time_ways(settings: MergeBenchmark, seq_len: int, device: torch.device) -> list[MergeTiming]:
    hidden_BSD, context = _texts(settings, settings.batch_size, seq_len, device)
    experts = _experts(settings, settings.num_experts).to(device)
    calls: dict[tuple[int, str], Callable[[], None]] = {}
    applied: set[tuple[int, str]] = set()
    for top_k in settings.time_top_ks:
        layers = {
            router: _layer(experts, router, top_k).to(device) for router in ("token_gate", *MERGED)
        }
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            PLAIN: layers["token_gate"],
            NAIVE: _Naive(layers[MERGED[0]]),
            **{router: layers[router] for router in MERGED},
        }
        for way, layer in ways.items():
            calls[top_k, way] = _call(layer, experts, hidden_BSD, context, settings.backward)
            if isinstance(layer, MergedLayer) and _applies(layer, hidden_BSD, context):
                applied.add((top_k, way))
    seconds = _time_interleaved(calls, settings.num_repeats, device)
    return [
        MergeTiming(
            seq_len,
            top_k,
            way,
            1e3 * statistics.median(own),
            statistics.median(a / b for a, b in zip(own, seconds[top_k, PLAIN], strict=True)),
            LiveMemory.peak_of(calls[top_k, way]) / 2**20,
            (top_k, way) in applied,
        )
        for (top_k, way), own in seconds.items()
    ]


@torch.no_grad()
def _applies(layer: MergedLayer, hidden_BSD: Tensor, context: RoutingContext) -> bool:
    """Whether the layer applies its experts to each token, by the gate of its first product."""
    merges: Merges = layer.gate(hidden_BSD.flatten(0, 1), context)
    ids_GK = merges.by_linear["in"].expert_ids
    num_groups, top_k = ids_GK.shape
    return applying_is_cheaper(len(merges.group_T), num_groups, top_k, int(ids_GK.unique().numel()))


class _Naive:
    """A weight of its own for every sequence: B × D × F numbers for each linear layer."""

    def __init__(self, layer: MoELayer) -> None:
        self._layer = layer

    def __call__(self, hidden_BSD: Tensor) -> Tensor:
        experts, router = self._layer.experts, self._layer.router
        assert router is not None
        merges: Merges = router(hidden_BSD.flatten(0, 1), current_context())
        inner_BSF = experts.activation(self._linear(hidden_BSD, "in", merges))
        return self._linear(inner_BSF, "out", merges)

    def _linear(self, rows_BSI: Tensor, name: str, merges: Merges) -> Tensor:
        weight_EOI = getattr(self._layer.experts, f"w_{name}")
        bias_EO = getattr(self._layer.experts, f"b_{name}")
        routing = merges.by_linear[name]
        ones_BKE = F.one_hot(routing.expert_ids, weight_EOI.shape[0]).to(weight_EOI.dtype)
        weights_BE = (routing.expert_weights.unsqueeze(-1) * ones_BKE).sum(dim=1)
        merged_BOI = torch.einsum("be,eoi->boi", weights_BE, weight_EOI)
        merged_B1O = (weights_BE @ bias_EO).unsqueeze(1)
        return torch.baddbmm(merged_B1O, rows_BSI, merged_BOI.transpose(1, 2))


def _call(
    layer: Callable[[Tensor], Tensor],
    experts: Experts,
    hidden_BSD: Tensor,
    context: RoutingContext,
    backward: bool,
) -> Callable[[], None]:
    grad_BSD = torch.ones_like(hidden_BSD)

    def forward_only() -> None:
        with torch.inference_mode(), use_context(context):
            layer(hidden_BSD)

    def forward_and_backward() -> None:
        experts.zero_grad(set_to_none=True)
        with use_context(context):
            layer(hidden_BSD.detach().requires_grad_()).backward(grad_BSD)

    return forward_and_backward if backward else forward_only


def _time_interleaved(
    calls: dict[tuple[int, str], Callable[[], None]], num_repeats: int, device: torch.device
) -> dict[tuple[int, str], Sequence[float]]:
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    for round_number in range(num_repeats + 1):
        for key, call in calls.items():
            wait_for(device)
            start_s = time.perf_counter()
            call()
            wait_for(device)
            if round_number:
                seconds[key].append(time.perf_counter() - start_s)
    return dict(seconds)
