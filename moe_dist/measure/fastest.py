"""Each model's fastest form on this machine, found by screening and then timed in turn.

Screening makes a pass or three of every form. What comes near a model's fastest stays, and is
timed in turn with what stayed of the other models, so that a busy machine slows all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn

from moe_dist.errors import ConversionError
from moe_dist.inference.backends import ORACLE, QUICK_FORMS
from moe_dist.measure.latency import (
    Latency,
    OtherWork,
    Rounds,
    any_task,
    measure_in_turn,
    random_batch,
    wait_for,
    watch_other_work,
)

TOLERANCE = 0.1
"""A form whose answers lie further from eager-fp32's, see `relative_error`, is not counted.

Rounding to bfloat16 leaves about 0.01 and to int8 0.05 of MiniLM's hidden states; wrong weights
leave as much as the answers themselves.
"""
NEAR = 1.25
"""What took up to so many times as long in screening as a model's fastest is timed in turn."""
MAX_CANDIDATES = 2
"""No more copies of a model wait for that at one batch size."""
HOPELESS = 3.0
"""After a pass that takes so many times as long as the fastest so far, no other is made.

The first one at a shape does not count: some forms compile then.
"""
SCREENING_PASSES = 2
LONG_MS = 1000.0
"""Passes that take longer vary little, so few of them are made."""
MAX_COMPARED = 2**20
"""Numbers of an answer that are compared; of more every n-th."""
SPARE_MEMORY = 1.5
"""A form is not tried where less memory is free than so many times what its model holds."""


class AnyForm(Protocol):
    """What makes a model's copy in another form; its text is its name."""

    def prepare(self, model: Any) -> Any:
        """Make the copy; a ConversionError if the model has no such form."""
        ...


@dataclass(frozen=True)
class Fastest:
    """The form in which a model took the least time at one batch size.

    Attributes:
        form: its name.
        latency: timed in turn with the other models.
        error: how far its answers lie from those in eager float32, see `relative_error`.
    """

    form: str
    latency: Latency
    error: float


@dataclass(frozen=True)
class FastestForms:
    """What was found.

    Attributes:
        by_model: by name and batch size.
        left_out: forms that models do not have or answer too far from, each with the reason.
        other_work: what else the machine did while they were timed in turn.
    """

    by_model: dict[str, dict[int, Fastest]]
    left_out: tuple[str, ...]
    other_work: OtherWork


@dataclass(frozen=True)
class Speedup:
    """How many times as fast one model is as another.

    Attributes:
        value: ratio of the times that a tenth of the passes stayed below.
        low: the least of this, and of the same for each half of the passes.
        high: the most of them.
    """

    value: float
    low: float
    high: float

    @classmethod
    def between(cls, other: Latency, own: Latency) -> Speedup:
        """Compare two that were timed in turn; `own` is the one whose speed is meant."""
        half = min(len(own.times_ms), len(other.times_ms)) // 2
        value = other.low_ms / own.low_ms
        found = [value]
        for part in (slice(None, half), slice(half, None)) if half else ():
            first, second = (Latency(one.times_ms[part]) for one in (other, own))
            found.append(first.low_ms / second.low_ms)
        return cls(value, min(found), max(found))


@dataclass(frozen=True)
class _Candidate:
    form: str
    model: Any
    error: float
    screened_ms: float


def find_fastest(
    models: Mapping[str, nn.Module],
    rounds: Rounds,
    *,
    batch_sizes: Sequence[int],
    seq_len: int,
    forms: Sequence[AnyForm] = QUICK_FORMS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FastestForms:
    """Time models on random tokens without padding, each in the form in which it is fastest.

    Args:
        models: transformers models by name, in eval mode.
        rounds: how often, for each batch size, what passed the screening is timed.
        batch_sizes: to measure, one after the other.
        seq_len: tokens in a sequence.
        forms: to try; eager in float32, which is the model itself, is always among them.
        progress: called with the forms screened, or the rounds made, and the most there will be.

    Returns:
        A form of each model at each batch size.
    """
    left_out: dict[tuple[str, str], list[str]] = {}
    screened: dict[str, dict[int, list[_Candidate]]] = {}
    tried = list(dict.fromkeys((ORACLE, *forms)))
    for place, (name, model) in enumerate(models.items()):

        def advance(done: int, place: int = place) -> None:
            progress(place * len(tried) + done, len(models) * len(tried))

        screened[name], reasons = _screen(model, tried, batch_sizes, seq_len, advance)
        for form, reason in reasons.items():
            left_out.setdefault((form, reason), []).append(name)
    found: dict[str, dict[int, Fastest]] = {name: {} for name in models}
    with watch_other_work() as look:
        for size in batch_sizes:
            candidates = {(name, one.form): one for name in models for one in screened[name][size]}
            is_long = max(one.screened_ms for one in candidates.values()) > LONG_MS
            timed = measure_in_turn(
                {key: one.model for key, one in candidates.items()},
                _few(rounds) if is_long else rounds,
                batch_sizes=(size,),
                seq_len=seq_len,
                progress=progress,
            )
            for name in models:
                own = [key for key in candidates if key[0] == name]
                best = min(own, key=lambda key: timed[key][size].low_ms)
                found[name][size] = Fastest(best[1], timed[best][size], candidates[best].error)
        work = look()
    said = (f"{form} of {', '.join(who)}: {why}" for (form, why), who in left_out.items())
    return FastestForms(found, tuple(said), work)


def _few(rounds: Rounds) -> Rounds:
    """Make as few passes as can be compared, without any that warm up."""
    return replace(rounds, least=min(2, rounds.least), repeats=1, num_warmups=0)


def relative_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Length of the difference between answers, all taken as one vector, over their length.

    Not the largest difference: a gate that decides otherwise for one token where two experts score
    alike is no fault, and changes little of this.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    missed = sum(float((a - b).square().sum()) for a, b in pairs)
    length = sum(float(b.square().sum()) for _, b in pairs)
    if missed == 0:
        return 0.0
    return float((missed / length) ** 0.5) if length else float("inf")


def _screen(
    model: Any,
    forms: Sequence[AnyForm],
    batch_sizes: Sequence[int],
    seq_len: int,
    progress: Callable[[int], None],
) -> tuple[dict[int, list[_Candidate]], dict[str, str]]:
    """Try every form; give the promising ones by batch size, and why others are left out."""
    device = next(model.parameters()).device
    batches = {size: random_batch(model, size, seq_len, device=device) for size in batch_sizes}
    expected = {size: _timed_answer(model, batch)[0] for size, batch in batches.items()}
    kept: dict[int, list[_Candidate]] = {size: [] for size in batch_sizes}
    reasons: dict[str, str] = {}
    for done, form in enumerate(forms, start=1):
        try:
            candidates = _try(model, form, batches, expected, kept)
        except ConversionError as fault:
            reasons[str(form)] = fault.message
        except Exception as fault:
            # A form is an extra; what was measured without it must not be lost.
            said = (str(fault).splitlines() or [""])[0]
            reasons[str(form)] = f"it failed with {type(fault).__name__}: {said}"
        else:
            for size, one in candidates.items():
                kept[size] = _promising([*kept[size], one])
        progress(done)
    return kept, reasons


def _try(
    model: Any,
    form: AnyForm,
    batches: Mapping[int, Mapping[str, Tensor]],
    expected: Mapping[int, Tensor],
    kept: Mapping[int, Sequence[_Candidate]],
) -> dict[int, _Candidate]:
    """Prepare a form, compare its answers, and time it where it may be the fastest."""
    if form != ORACLE:
        _see_that_it_fits(model)
    prepared = model if form == ORACLE else form.prepare(model)
    error = 0.0
    if form != ORACLE:
        answers = [_timed_answer(prepared, batch)[0] for batch in batches.values()]
        error = relative_error(answers, expected.values())
    if not error <= TOLERANCE:
        raise ConversionError(
            f"its answers are {error:.2g} of their length away from those of {ORACLE}, and at "
            f"most {TOLERANCE:g} is rounding"
        )
    found = {}
    for size, batch in batches.items():
        best_ms = min((one.screened_ms for one in kept[size]), default=float("inf"))
        times: list[float] = []
        enough_ms = min(HOPELESS * best_ms, LONG_MS)
        while len(times) < SCREENING_PASSES and min(times, default=0.0) <= enough_ms:
            times.append(_timed_answer(prepared, batch)[1])
        found[size] = _Candidate(str(form), prepared, error, min(times))
    return found


def _see_that_it_fits(model: nn.Module) -> None:
    """Refuse a copy for which memory may be too short, in place of being killed for it."""
    size = sum(one.numel() * one.element_size() for one in model.parameters())
    free = psutil.virtual_memory().available
    if free < SPARE_MEMORY * size:
        raise ConversionError(
            f"it was not tried, since {free / 2**30:.1f} GiB of memory are free and the model "
            f"holds {size / 2**30:.1f} GiB"
        )


def _promising(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    ranked = sorted(candidates, key=lambda one: one.screened_ms)
    limit_ms = NEAR * ranked[0].screened_ms
    return [one for one in ranked[:MAX_CANDIDATES] if one.screened_ms <= limit_ms]


def _timed_answer(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """Give numbers of a model's first output (logits, or hidden states), and milliseconds."""
    device = batch["input_ids"].device
    with torch.inference_mode(), any_task(model):
        wait_for(device)
        start_s = time.perf_counter()
        answer: Tensor = model(**batch)[0]
        wait_for(device)
        passed_ms = (time.perf_counter() - start_s) * 1e3
    # An odd number, so that not always the same columns are looked at.
    every = answer.numel() // MAX_COMPARED | 1
    return answer.flatten()[::every].float().cpu(), passed_ms
