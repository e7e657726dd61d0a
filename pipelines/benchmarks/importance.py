"""Time importance scoring against the loop that takes a backward for each sample.

The scorer gets the batches that the chain's loader makes, of sentences of like length. The loop
runs each sample alone and unpadded, with gradients for all weights, as published code does; a
second one asks for the FFNs' weight gradients only, which is the least that it can do. The loops
get every n-th sentence in the order of length, since their time for a sentence does not depend
on how many there are; all three ways must score these the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.conversion import score_importance
from moe_dist.conversion.families import FFNSlot, find_slots
from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.errors import ConfigError
from moe_dist.measure.latency import wait_for
from moe_dist.tasks import model_kind

from .models import random_classifier
from .sizes import below_one, cpu_threads

GOAL_RATIO = 8.0
TOLERANCE = 1e-5
_PEAK_REPEATS = 50


@dataclass(frozen=True)
class ImportanceBenchmark:
    """What to time. Defaults are MiniLM's sizes and lengths like those of the demo's sentences.

    Args:
        num_samples: sentences for the scorer.
        num_looped: how many of these the loops get.
        batch_size: sentences of one batch, for the scorer; the chain's own by default.
        mean_tokens: of the log-normal distribution of lengths, before they are cut.
        spread: standard deviation of the lengths' logarithms; 0 for equal lengths.
        min_tokens: shorter sentences get this length.
        max_tokens: longer sentences get this length.
        num_repeats: timed passes of each way; the fastest counts.
        num_threads: CPU threads; torch's own choice if None.
        model: directory of a fine-tuned BERT-like classifier; random MiniLM weights if None.
        device: "cpu" or "cuda"; an accelerator where there is one if None.
        d_model: width of the random model.
        num_layers: layers of the random model.
        num_neurons: F of the random model.
        vocab_size: token embeddings of the random model.
        seed: of weights and sentences.
    """

    num_samples: int = 512
    num_looped: int = 64
    batch_size: int = 32
    mean_tokens: float = 27.0
    spread: float = 0.45
    min_tokens: int = 6
    max_tokens: int = 64
    num_repeats: int = 3
    num_threads: int | None = None
    model: Path | None = None
    device: str | None = None
    d_model: int = 384
    num_layers: int = 6
    num_neurons: int = 1536
    vocab_size: int = 30_522
    seed: int = 0


@dataclass(frozen=True)
class ImportanceTiming:
    """One way of scoring.

    Args:
        name: "one backward a batch", "loop" or "loop, FFN gradients only".
        sentence_ms: milliseconds for one sentence, in the fastest pass.
        sentence_gflop: matrix products for one sentence, in 10^9 operations, padding included;
            attention's own, which are few, where torch can count them.
        ratio: its time over the batch scorer's.
        largest_difference: of its scores from the scorer's, relative to each layer's largest.
    """

    name: str
    sentence_ms: float
    sentence_gflop: float
    ratio: float
    largest_difference: float


@dataclass(frozen=True)
class ImportanceResult:
    """What `run` measured.

    Args:
        timings: the batch scorer first, then the two loops.
        mean_tokens: of the sentences drawn, for the scorer and for the loops.
        padding: share of the scorer's positions that is padding.
        peak_gflops: rate of one large product of the FFN's shape on this machine, in 10^9
            operations a second.
        bound: the ratio at which the scorer's products alone would run at that rate.
    """

    timings: list[ImportanceTiming]
    mean_tokens: tuple[float, float]
    padding: float
    peak_gflops: float
    bound: float


def run(settings: ImportanceBenchmark | None = None) -> ImportanceResult:
    """Score sentences in all three ways, in turns; a ConfigError if a size is not positive."""
    settings = ImportanceBenchmark() if settings is None else settings
    _check(settings)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_model(settings).to(device).eval()
    encoded = draw_sentences(model, settings)
    by_length = np.argsort(encoded.lengths, kind="stable")
    # From the middle of each stretch, so that the mean length is the same.
    step = max(1, len(encoded) // settings.num_looped)
    looped = encoded.subset(by_length[step // 2 :: step][: settings.num_looped])
    batches = _to(device, eval_batches(encoded, batch_size=settings.batch_size))
    looped_batches = _to(device, eval_batches(looped, batch_size=settings.batch_size))
    samples = _to(device, eval_batches(looped, batch_size=1))
    ways: dict[str, tuple[int, Callable[[], list[Tensor]]]] = {
        "one backward a batch": (len(encoded), lambda: score_importance(model, batches)),
        "loop": (len(looped), lambda: score_by_loop(model, samples)),
        "loop, FFN gradients only": (
            len(looped),
            lambda: score_by_loop(model, samples, ffn_only=True),
        ),
    }
    seconds = dict.fromkeys(ways, float("inf"))
    gflop: dict[str, float] = {}
    with cpu_threads(settings.num_threads):
        expected = score_importance(model, looped_batches)
        scores = {name: score() for name, (_, score) in list(ways.items())[1:]}
        for name, (count, score) in ways.items():
            with FlopCounterMode(display=False) as counter:
                score()
            gflop[name] = counter.get_total_flops() / count / 1e9
        peak_gflops = _peak_gflops(model, batches, device)
        for _ in range(settings.num_repeats):
            for name, (count, score) in ways.items():
                seconds[name] = min(seconds[name], _time(score, device) / count)
    first, loop = list(ways)[:2]
    positions = sum(batch["input_ids"].numel() for batch in batches)
    return ImportanceResult(
        timings=[
            ImportanceTiming(
                name=name,
                sentence_ms=seconds[name] * 1e3,
                sentence_gflop=gflop[name],
                ratio=seconds[name] / seconds[first],
                largest_difference=_difference(scores.get(name, expected), expected),
            )
            for name in ways
        ],
        mean_tokens=(float(encoded.lengths.mean()), float(looped.lengths.mean())),
        padding=1 - encoded.num_tokens / positions,
        peak_gflops=peak_gflops,
        bound=seconds[loop] * peak_gflops / gflop[first],
    )


def score_by_loop(
    model: Any, samples: Sequence[dict[str, Tensor]], *, ffn_only: bool = False
) -> list[Tensor]:
    """Score by the definition: weights times their gradients, one backward for each sample.

    Args:
        model: a dense classifier in eval mode.
        samples: batches of one, with labels.
        ffn_only: compute no gradient but the FFN weights'.

    Returns:
        One float32 (F,) tensor on the CPU for each FFN.
    """
    slots = find_slots(model)
    scores = [torch.zeros(slot.num_neurons, device=model.device) for slot in slots]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(linear.weight) for slot in slots for linear in _linear_layers(slot)}
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(not ffn_only or id(parameter) in chosen)
        for sample in samples:
            model.zero_grad()
            model(
                input_ids=sample["input_ids"],
                attention_mask=sample["attention_mask"],
                labels=sample["labels"],
            ).loss.backward()
            with torch.no_grad():
                for slot, score_F in zip(slots, scores, strict=True):
                    score_F += _signed_score(slot).abs()
    finally:
        model.zero_grad()
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
    return [score_F.cpu() for score_F in scores]


def to_table(result: ImportanceResult, settings: ImportanceBenchmark) -> Table:
    """Lay the timings out for a terminal."""
    table = Table(
        title=f"sentences of {result.mean_tokens[0]:.1f} tokens, batches of "
        f"{settings.batch_size} with {result.padding:.0%} padding"
    )
    table.add_column("way", no_wrap=True)
    for heading in ("ms/sentence", "GFLOP/s", "ratio", "largest difference"):
        table.add_column(heading, justify="right")
    for timing in result.timings:
        table.add_row(
            timing.name,
            f"{timing.sentence_ms:.2f}",
            f"{timing.sentence_gflop / timing.sentence_ms * 1e3:.0f}",
            f"{timing.ratio:.2f}",
            f"{timing.largest_difference:.1e}",
        )
    return table


def main(*settings: ImportanceBenchmark) -> None:
    """Run the benchmark for each of the settings, or the defaults, and print its tables.

    What `moe-dist benchmark importance` calls.
    """
    console = Console(highlight=False)
    for one in settings or (ImportanceBenchmark(),):
        result = run(one)
        console.print(to_table(result, one))
        loop = result.timings[1]
        verdict = "reached" if loop.ratio >= GOAL_RATIO else "missed"
        same = all(timing.largest_difference <= TOLERANCE for timing in result.timings)
        console.print(
            f"{loop.ratio:.1f} times faster than the loop; the goal of {GOAL_RATIO:g} is "
            f"{verdict}; scores are {'the same' if same else 'NOT the same'} to {TOLERANCE:g}"
        )
        console.print(
            f"a large matrix product runs at {result.peak_gflops:.0f} GFLOP/s here; a scorer "
            f"that did nothing else would be {result.bound:.1f} times faster than the loop"
        )


def _check(settings: ImportanceBenchmark) -> None:
    faults = below_one(
        settings,
        "num_samples",
        "num_looped",
        "batch_size",
        "mean_tokens",
        "min_tokens",
        "num_repeats",
    )
    if settings.spread < 0:
        faults.append(f"spread is {settings.spread}; it must not be negative")
    if settings.max_tokens < settings.min_tokens:
        faults.append(f"max_tokens is {settings.max_tokens}; it must not be below min_tokens")
    if faults:
        raise ConfigError(faults, source="benchmark importance")


def build_model(settings: ImportanceBenchmark) -> Any:
    """Load the model that is named, or draw one at random."""
    if settings.model is not None:
        from moe_dist.inference import load_model

        return load_model(settings.model)
    return random_classifier(
        vocab_size=settings.vocab_size,
        d_model=settings.d_model,
        num_layers=settings.num_layers,
        num_neurons=settings.num_neurons,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
    )


def draw_sentences(model: Any, settings: ImportanceBenchmark) -> Encoded:
    """Draw sentences of random tokens with log-normal lengths."""
    rng = np.random.default_rng(settings.seed)
    count = settings.num_samples
    drawn = rng.lognormal(
        np.log(settings.mean_tokens) - settings.spread**2 / 2, settings.spread, count
    )
    lengths = np.clip(np.rint(drawn), settings.min_tokens, settings.max_tokens).astype(np.int64)
    labels: NDArray[Any] = rng.integers(0, max(2, model.config.num_labels), count)
    return Encoded(
        input_ids=rng.integers(1, model.config.vocab_size, lengths.sum(), dtype=np.int32),
        token_type_ids=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=labels if model_kind(model).has_classes else labels.astype(np.float32),
        sample_ids=np.arange(count),
    )


def _to(device: torch.device, batches: Iterator[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def _time(call: Callable[[], Any], device: torch.device) -> float:
    wait_for(device)
    start_s = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start_s


def _peak_gflops(model: Any, batches: Sequence[dict[str, Tensor]], device: torch.device) -> float:
    num_rows = max(batch["input_ids"].numel() for batch in batches)
    weight = find_slots(model)[0].weights().w_in.detach()
    hidden = torch.randn(num_rows, weight.shape[1], device=device)
    best_s = min(_time(lambda: hidden @ weight.T, device) for _ in range(_PEAK_REPEATS))
    return 2 * num_rows * weight.numel() / best_s / 1e9


def _linear_layers(slot: FFNSlot) -> list[Any]:
    return [one for one in (slot.linear_in, slot.gate, slot.linear_out) if one is not None]


def _signed_score(slot: FFNSlot) -> Tensor:
    """The three products of one sample, before the absolute value."""
    terms = []
    for linear in _linear_layers(slot):
        neurons_last = (linear is slot.linear_out) != slot.spec.transposed
        terms.append((linear.weight * linear.weight.grad).sum(dim=0 if neurons_last else 1))
    return torch.stack(terms).sum(dim=0)


def _difference(scores: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    return max(
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(scores, reference, strict=True)
    )
