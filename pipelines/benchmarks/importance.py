"""Time importance scoring against the loop that takes a backward for each sample.

The loop runs each sample alone and unpadded, with gradients for all weights, as published code
does; a second one asks for the FFNs' weight gradients only, which is the least that it can do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_dist.conversion import score_importance
from moe_dist.conversion.families import FFNSlot, find_slots
from moe_dist.errors import ConfigError

GOAL_RATIO = 8.0
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ImportanceBenchmark:
    """What to time. Defaults are MiniLM's sizes and lengths like those of single sentences.

    Args:
        num_samples: sentences to score.
        batch_size: sentences of one batch, for the scorer.
        min_tokens: shortest sentence.
        max_tokens: longest sentence; lengths lie between them, short ones more often.
        num_repeats: timed passes of each way; the median counts.
        num_threads: CPU threads; torch's own choice if None.
        model: directory of a fine-tuned BERT-like classifier; random MiniLM weights if None.
        device: "cpu" or "cuda"; an accelerator where there is one if None.
        d_model: width of the random model.
        num_layers: layers of the random model.
        num_neurons: F of the random model.
        vocab_size: token embeddings of the random model.
        seed: of weights and sentences.
    """

    num_samples: int = 64
    batch_size: int = 32
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
        median_s: seconds for all samples.
        ratio: its time over the batch scorer's.
        largest_difference: of its scores from the scorer's, relative to each layer's largest.
    """

    name: str
    median_s: float
    ratio: float
    largest_difference: float


def run(settings: ImportanceBenchmark | None = None) -> list[ImportanceTiming]:
    """Score the same sentences in all three ways, in turns.

    Args:
        settings: what to time; the defaults if None.

    Returns:
        The batch scorer first, then the two loops.

    Raises:
        ConfigError: if a size is not positive.
    """
    settings = ImportanceBenchmark() if settings is None else settings
    _check(settings)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _build_model(settings).to(device).eval()
    samples = _draw_samples(model, settings, device)
    batches = [
        _pad(samples[start : start + settings.batch_size])
        for start in range(0, len(samples), settings.batch_size)
    ]
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "one backward a batch": lambda: score_importance(model, batches),
        "loop": lambda: score_by_loop(model, samples),
        "loop, FFN gradients only": lambda: score_by_loop(model, samples, ffn_only=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, list[Tensor]] = {}
    with _threads(settings.num_threads):
        score_importance(model, batches[:1])
        score_by_loop(model, samples[:2])
        for _ in range(settings.num_repeats):
            for name, score in ways.items():
                _wait(device)
                start_s = time.perf_counter()
                scores[name] = score()
                _wait(device)
                seconds[name].append(time.perf_counter() - start_s)
    first = next(iter(ways))
    base_s = statistics.median(seconds[first])
    return [
        ImportanceTiming(
            name=name,
            median_s=statistics.median(seconds[name]),
            ratio=statistics.median(seconds[name]) / base_s,
            largest_difference=_difference(scores[name], scores[first]),
        )
        for name in ways
    ]


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
            model(**sample).loss.backward()
            with torch.no_grad():
                for slot, score_F in zip(slots, scores, strict=True):
                    score_F += _signed_score(slot).abs()
    finally:
        model.zero_grad()
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
    return [score_F.cpu() for score_F in scores]


def to_table(timings: Sequence[ImportanceTiming], settings: ImportanceBenchmark) -> Table:
    """Lay the timings out for a terminal.

    Args:
        timings: what `run` returned.
        settings: what it ran with.

    Returns:
        A rich table.
    """
    table = Table(
        title=f"{settings.num_samples} sentences of {settings.min_tokens} to "
        f"{settings.max_tokens} tokens, batches of {settings.batch_size}"
    )
    for heading in ("way", "seconds", "times the scorer's", "largest difference"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.median_s:.3f}",
            f"{timing.ratio:.2f}",
            f"{timing.largest_difference:.1e}",
        )
    return table


def main(settings: ImportanceBenchmark | None = None) -> None:
    """Run the benchmark and print its table; what `moe-dist benchmark importance` calls.

    Args:
        settings: what to time; the defaults if None.
    """
    settings = ImportanceBenchmark() if settings is None else settings
    timings = run(settings)
    console = Console(highlight=False)
    console.print(to_table(timings, settings))
    loop = timings[1]
    verdict = "reached" if loop.ratio >= GOAL_RATIO else "missed"
    same = all(timing.largest_difference <= TOLERANCE for timing in timings)
    console.print(
        f"{loop.ratio:.1f} times faster than the loop; the goal of {GOAL_RATIO:g} is {verdict}; "
        f"scores are {'the same' if same else 'NOT the same'} to {TOLERANCE:g}"
    )


def _check(settings: ImportanceBenchmark) -> None:
    faults = [
        f"{name} is {getattr(settings, name)}; it must be at least 1"
        for name in ("num_samples", "batch_size", "min_tokens", "num_repeats")
        if getattr(settings, name) < 1
    ]
    if settings.max_tokens < settings.min_tokens:
        faults.append(f"max_tokens is {settings.max_tokens}; it must not be below min_tokens")
    if faults:
        raise ConfigError(faults, source="benchmark importance")


def _build_model(settings: ImportanceBenchmark) -> Any:
    if settings.model is not None:
        from moe_dist.inference import load_model

        return load_model(settings.model)
    from transformers import BertConfig, BertForSequenceClassification

    config: Any = BertConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.d_model,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=max(1, settings.d_model // 32),
        intermediate_size=settings.num_neurons,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return BertForSequenceClassification(config)


def _draw_samples(
    model: Any, settings: ImportanceBenchmark, device: torch.device
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(settings.seed)
    # Squared, so that short sentences are more frequent, as in real text.
    spread = torch.rand(settings.num_samples, generator=generator).square()
    lengths = settings.min_tokens + spread * (settings.max_tokens - settings.min_tokens)
    num_labels = model.config.num_labels
    samples = []
    for length in lengths.round().long().tolist():
        ids = torch.randint(1, model.config.vocab_size, (1, length), generator=generator)
        label = torch.randint(0, max(2, num_labels), (1,), generator=generator)
        samples.append(
            {
                "input_ids": ids.to(device),
                "attention_mask": torch.ones_like(ids).to(device),
                "labels": (label.float() if num_labels == 1 else label).to(device),
            }
        )
    return samples


def _pad(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    length = max(sample["input_ids"].shape[1] for sample in samples)
    batch = {"labels": torch.cat([sample["labels"] for sample in samples])}
    for name in ("input_ids", "attention_mask"):
        rows = [
            torch.nn.functional.pad(sample[name], (0, length - sample[name].shape[1]))
            for sample in samples
        ]
        batch[name] = torch.cat(rows)
    return batch


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


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
