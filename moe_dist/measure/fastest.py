"""Each model's fastest form on this machine, found by screening and then timed in turn.

Screening makes a pass or three of every form. What comes near a model's fastest stays, and is
timed in turn with what stayed of the other models, so that a busy machine slows all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from moe_dist.inference.backends import ORACLE, QUICK_FORMS
from moe_dist.measure.latency import Latency, OtherWork, Rounds, WorkWatch, measure_in_turn
from moe_dist.measure.screening import (
    LONG_MS,
    AnyForm,
    Candidate,
    Screening,
    describe_fault,
    screen,
)

SEARCH_S = 120.0
"""After so many seconds no other form is tried, and of each model one is timed."""


@dataclass(frozen=True)
class Fastest:
    """The form in which a model took the least time at one batch size.

    Attributes:
        form: its name.
        latency: timed in turn with the other models.
        error: how far its answers lie from those in eager float32.
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
        other_work: what else the machine did while they were screened and timed.
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
        half: passes in each half, of the model with fewer.
    """

    value: float
    low: float
    high: float
    half: int

    @classmethod
    def between(cls, other: Latency, own: Latency) -> Speedup:
        """Compare two that were timed in turn; `own` is the one whose speed is meant."""
        half = min(len(own.times_ms), len(other.times_ms)) // 2
        value = other.low_ms / own.low_ms
        found = [value]
        for part in (slice(None, half), slice(half, None)) if half else ():
            first, second = (Latency(one.times_ms[part]) for one in (other, own))
            found.append(first.low_ms / second.low_ms)
        return cls(value, min(found), max(found), half)


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

    What fails in another form is left out; eager in float32 alone may raise.

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
    begin = time.monotonic()
    watch = WorkWatch()
    tried = list(dict.fromkeys((ORACLE, *forms)))
    kept: dict[str, dict[int, list[Candidate]]] = {name: {} for name in models}
    left_out: dict[tuple[str, str], list[str]] = {}
    # Without a screening nothing is known of a pass, so that few are made.
    eager = {
        name: dict.fromkeys(batch_sizes, Candidate(str(ORACLE), model, 0.0, float("inf")))
        for name, model in models.items()
    }
    only_eager = f"every form but {ORACLE}", list(models)
    try:
        screenings = {
            name: Screening(model, batch_sizes, seq_len, watch) for name, model in models.items()
        }
        left_out = screen(screenings, tried, SEARCH_S, progress)
        eager = {
            name: {size: one.eager(size) for size in batch_sizes}
            for name, one in screenings.items()
        }
        kept = {name: one.kept for name, one in screenings.items()}
        del screenings
    except Exception as fault:
        why = f"a pass in {ORACLE} failed with {describe_fault(fault)}"
        left_out[only_eager[0], why] = only_eager[1]
    found: dict[str, dict[int, Fastest]] = {name: {} for name in models}
    for size in batch_sizes:
        # Taken out, so that copies go when nothing is left to time them for.
        candidates = {name: kept[name].pop(size, []) or [eager[name][size]] for name in models}
        if time.monotonic() - begin > SEARCH_S:
            for form, names in _keep_the_best(candidates).items():
                why = f"no time was left at batch {size} after {SEARCH_S:g} s"
                left_out.setdefault((form, why), []).extend(names)
        timed, why = _time(candidates, rounds, size, seq_len, progress, watch)
        if why and any(one.form != str(ORACLE) for own in candidates.values() for one in own):
            left_out[only_eager[0], f"at batch {size} a pass failed with {why}"] = only_eager[1]
            kept = {name: {} for name in models}
            candidates = {name: [eager[name][size]] for name in models}
            timed, why = _time(candidates, rounds, size, seq_len, progress, watch)
        if why:
            raise RuntimeError(f"a pass at batch {size} failed with {why}")
        for name, own in candidates.items():
            best = min(own, key=lambda one: timed[name, one.form].low_ms)
            found[name][size] = Fastest(best.form, timed[name, best.form], best.error)
        del candidates, own, best
    said = (f"{form} of {', '.join(who)}: {why}" for (form, why), who in left_out.items())
    return FastestForms(found, tuple(said), watch.found())


def _keep_the_best(candidates: dict[str, list[Candidate]]) -> dict[str, list[str]]:
    """Leave each model the form that screening found to be its fastest; give those that go."""
    gone: dict[str, list[str]] = {}
    for name, own in candidates.items():
        own.sort(key=lambda one: one.screened_ms)
        for one in own[1:]:
            gone.setdefault(one.form, []).append(name)
        del own[1:]
    return gone


def _time(
    candidates: Mapping[str, Sequence[Candidate]],
    rounds: Rounds,
    size: int,
    seq_len: int,
    progress: Callable[[int, int], None],
    watch: WorkWatch,
) -> tuple[dict[tuple[str, str], Latency], str]:
    """Time candidates in turn, by model and form; or say why that failed."""
    models = {(name, one.form): one.model for name, own in candidates.items() for one in own}
    is_long = max(one.screened_ms for own in candidates.values() for one in own) > LONG_MS
    try:
        with watch.looking():
            timed = measure_in_turn(
                models,
                _few(rounds) if is_long else rounds,
                batch_sizes=(size,),
                seq_len=seq_len,
                progress=progress,
            )
    except Exception as fault:
        return {}, describe_fault(fault)
    return {key: by_size[size] for key, by_size in timed.items()}, ""


def _few(rounds: Rounds) -> Rounds:
    """Make as few passes as can be compared, without any that warm up."""
    return replace(rounds, least=min(2, rounds.least), repeats=1, num_warmups=0)
