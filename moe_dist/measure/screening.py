"""Which forms of models answer alike and come near the fastest, by a pass or three of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_dist.errors import ConversionError
from moe_dist.inference.backends import ORACLE
from moe_dist.measure.free_memory import free_memory
from moe_dist.measure.latency import WorkWatch, any_task, random_batch, wait_for

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

The first one at a shape does not count unless it is long: some forms compile then.
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
class Candidate:
    """A form that is to be timed.

    Attributes:
        form: its name.
        model: in that form.
        error: of its answers, see `relative_error`.
        screened_ms: the shortest of its passes so far.
    """

    form: str
    model: Any
    error: float
    screened_ms: float


class Screening:
    """Tries forms of one model, and keeps the promising ones at each batch size.

    Args:
        model: a transformers model in eval mode.
        batch_sizes: to try forms at.
        seq_len: tokens in a sequence.
        watch: looks on while passes are made.

    Attributes:
        kept: what is to be timed, by batch size.
    """

    def __init__(
        self, model: Any, batch_sizes: Sequence[int], seq_len: int, watch: WorkWatch
    ) -> None:
        self.kept: dict[int, list[Candidate]] = {size: [] for size in batch_sizes}
        self._model = model
        self._watch = watch
        device = next(model.parameters()).device
        # The smallest first: what is hopeless there is not tried with more.
        self._batches = {
            size: random_batch(model, size, seq_len, device=device) for size in sorted(batch_sizes)
        }
        with watch.looking():
            self._expected = {
                size: timed_answer(model, batch) for size, batch in self._batches.items()
            }

    def eager(self, size: int) -> Candidate:
        """Give the model as it is."""
        return Candidate(str(ORACLE), self._model, 0.0, self._expected[size][1])

    def try_form(self, form: AnyForm) -> str:
        """Prepare, compare and time a form; give nothing, or why it is left out."""
        try:
            found = self._try(form)
        except ConversionError as fault:
            return fault.message
        except Exception as fault:
            # A form is an extra; what was measured without it must not be lost.
            return f"it failed with {describe_fault(fault)}"
        for size, one in found.items():
            self.kept[size] = _promising([*self.kept[size], one])
        return ""

    def _try(self, form: AnyForm) -> dict[int, Candidate]:
        if form == ORACLE:
            firsts = {size: passed_ms for size, (_, passed_ms) in self._expected.items()}
            with self._watch.looking():
                return self._passes(form, self._model, 0.0, firsts)
        see_that_it_fits(self._model)
        prepared = form.prepare(self._model)
        with self._watch.looking():
            error, firsts = self._compare(prepared)
            if not error <= TOLERANCE:
                raise ConversionError(
                    f"its answers are {error:.3g} of their length away from those of {ORACLE}, "
                    f"and at most {TOLERANCE:g} is rounding"
                )
            return self._passes(form, prepared, error, firsts)

    def _compare(self, prepared: Any) -> tuple[float, dict[int, float]]:
        answers, firsts = [], {}
        for size, batch in self._batches.items():
            answer, firsts[size] = timed_answer(prepared, batch)
            answers.append(answer)
            best_ms = self._best_ms(size)
            if firsts[size] > max(LONG_MS, HOPELESS * best_ms):
                raise ConversionError(
                    f"a pass at batch {size} took {firsts[size] / 1e3:.1f} s, more than "
                    f"{HOPELESS:g} times as long as another form's"
                )
        return relative_error(answers, (one for one, _ in self._expected.values())), firsts

    def _passes(
        self, form: AnyForm, prepared: Any, error: float, firsts: Mapping[int, float]
    ) -> dict[int, Candidate]:
        found = {}
        for size, batch in self._batches.items():
            times = [firsts[size]] if firsts[size] > LONG_MS else []
            enough_ms = min(HOPELESS * self._best_ms(size), LONG_MS)
            while len(times) < SCREENING_PASSES and min(times, default=0.0) <= enough_ms:
                times.append(timed_answer(prepared, batch)[1])
            found[size] = Candidate(str(form), prepared, error, min(times))
        return found

    def _best_ms(self, size: int) -> float:
        return min((one.screened_ms for one in self.kept[size]), default=float("inf"))


def screen(
    screenings: Mapping[str, Screening],
    forms: Sequence[AnyForm],
    limit_s: float,
    progress: Callable[[int, int], None],
) -> dict[tuple[str, str], list[str]]:
    """Try every form of every model, one form after the other, so that time ends for all alike.

    Args:
        screenings: by the model's name.
        forms: to try; eager in float32 is tried whatever the time.
        limit_s: no other form is begun after so many seconds.
        progress: called with the forms tried, and all there are.

    Returns:
        Names of the models that lack a form, by form and reason.
    """
    begin = time.monotonic()
    left_out: dict[tuple[str, str], list[str]] = {}
    total = len(forms) * len(screenings)
    done = 0
    for form in forms:
        is_late = form != ORACLE and time.monotonic() - begin > limit_s
        late = f"it was not tried, since those before it took longer than {limit_s:g} s"
        for name, screening in screenings.items():
            reason = late if is_late else screening.try_form(form)
            if reason:
                left_out.setdefault((str(form), reason), []).append(name)
            done += 1
            progress(done, total)
    return left_out


def describe_fault(fault: Exception) -> str:
    """Say in one line what has failed."""
    return f"{type(fault).__name__}: {(str(fault).splitlines() or [''])[0]}"


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


def see_that_it_fits(model: nn.Module) -> None:
    """Refuse a copy for which memory may be too short, in place of being killed for it."""
    size = sum(one.numel() * one.element_size() for one in model.parameters())
    free = free_memory(next(model.parameters()).device)
    if free < SPARE_MEMORY * size:
        raise ConversionError(
            f"it was not tried, since {free / 2**30:.1f} GiB of memory are free and the model "
            f"holds {size / 2**30:.1f} GiB"
        )


def _promising(candidates: Sequence[Candidate]) -> list[Candidate]:
    ranked = sorted(candidates, key=lambda one: one.screened_ms)
    limit_ms = NEAR * ranked[0].screened_ms
    return [one for one in ranked[:MAX_CANDIDATES] if one.screened_ms <= limit_ms]


def timed_answer(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, float]:
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
    # A view of a part keeps the whole answer in memory.
    return answer.flatten()[::every].clone().float().cpu(), passed_ms
