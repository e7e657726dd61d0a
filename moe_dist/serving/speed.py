"""The form in which a model answers fastest on this machine, and what a call of it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_dist.errors import ConversionError
from moe_dist.inference.backends import QUICK_FORMS, Form
from moe_dist.inference.serving import TextModel, TextReader
from moe_dist.serving.batching import CallCost
from moe_dist.serving.settings import AUTO

Call = tuple[int, ...]
"""Tokens of each text of a call that is timed; fewer where the model reads fewer."""
SHORT, LONG, MANY = (16,), (128,), (128,) * 8
MIXED = (128, *(16,) * 7)
CALLS = (SHORT, LONG, MANY, MIXED)
NUM_ROUNDS = 4
NUM_COST_REPEATS = 2
BUDGET_S = 20.0
_MOST_OVERHEAD = 1e6
_WORDS = "the film was good and the food was not "


@dataclass(frozen=True)
class FormChoice:
    """A model in the form that it is served in.

    Attributes:
        model: prepared.
        form: as it is written.
        cost: of a call.
        reason: why this form, in a line.
    """

    model: TextModel
    form: str
    cost: CallCost
    reason: str


def choose_form(model: TextModel, wanted: str) -> FormChoice:
    """Bring a model into a form, or into the fastest one it has here for `auto`.

    All are timed in turn, so that a busy machine slows all alike; the least time of each counts.
    The fastest has the least product of its times.

    Args:
        model: as it was trained, on the CPU.
        wanted: a form such as `lean-bf16`, or `auto`.

    Returns:
        The choice.

    Raises:
        ConversionError: if there is no such form, or the model does not have it.
    """
    forms = QUICK_FORMS if wanted == AUTO else (Form.parse(wanted),)
    prepared: dict[str, TextModel] = {}
    refused = []
    for form in forms:
        try:
            prepared[str(form)] = model.in_form(form)
        except ConversionError as fault:
            if wanted != AUTO:
                raise
            refused.append(f"{form} is not there ({fault.message})")
    times = time_forms(prepared)
    best = min(times, key=lambda name: math.prod(times[name].values()))
    said = [f"{name} {_spoken(own)}" for name, own in times.items()]
    why = "the fastest here" if wanted == AUTO else "as asked"
    calls = "1 short, 1 long, 8 long, 1 long and 7 short texts"
    reason = f"{best}, {why}; ms for {calls}: " + "; ".join(said + refused)
    cost = call_cost(_least_times(prepared[best], best, times[best]), model.limit)
    return FormChoice(prepared[best], best, cost, reason)


def _least_times(model: TextModel, form: str, times: Mapping[Call, float]) -> dict[Call, float]:
    """Time one form again: long calls slowed by other work would end batches of several texts."""
    more = [times, *(time_forms({form: model})[form] for _ in range(NUM_COST_REPEATS))]
    return {call: min(own[call] for own in more) for call in CALLS}


def time_forms(models: Mapping[str, TextModel]) -> dict[str, dict[Call, float]]:
    """Seconds that each model takes for each of `CALLS`; the least of some rounds."""
    some = next(iter(models.values()))
    columns = {call: probe_texts(some, call) for call in CALLS}
    found = {name: dict.fromkeys(CALLS, math.inf) for name in models}
    begin = time.monotonic()
    for done in range(NUM_ROUNDS):
        if done > 0 and time.monotonic() - begin > BUDGET_S:
            break
        for name, model in models.items():
            for call in CALLS:
                start = time.perf_counter()
                model.answers(columns[call])
                took = time.perf_counter() - start
                found[name][call] = min(found[name][call], took)
    return found


def probe_texts(model: TextReader, lengths: Call) -> list[list[str]]:
    """Make texts of about so many tokens each, or of what the model reads of them."""
    return texts_of_lengths(model, _read_of(lengths, model.limit))


def _read_of(lengths: Call, limit: int | None) -> list[int]:
    """What a model reads of texts; unlike ones stay in proportion, so that some are padded."""
    if limit is None or limit >= max(lengths):
        return list(lengths)
    if len(set(lengths)) > 1:
        return [max(1, length * limit // max(lengths)) for length in lengths]
    return [limit for _ in lengths]


def texts_of_lengths(model: TextReader, lengths: Sequence[int]) -> list[list[str]]:
    """Make texts of about as many tokens each, in as many columns as the model reads."""
    words = _WORDS.split()

    def text(num_words: int) -> str:
        return " ".join(words[place % len(words)] for place in range(num_words))

    def columns(texts: list[str]) -> list[list[str]]:
        own = len(model.kind.text_columns) if model.kind.reads_pairs else 1
        return [*([words[0]] * len(texts) for _ in range(own - 1)), texts]

    some, more = model.lengths(columns([text(1), text(1 + len(words))]))
    by_word = max((more - some) / len(words), 1e-3)
    return columns([text(max(1, 1 + round((wanted - some) / by_word))) for wanted in lengths])


def call_cost(times: Mapping[Call, float], limit: int | None = None) -> CallCost:
    """Fit what a call costs beside its tokens, and what padding costs in it.

    The shortest and the longest call tell of tokens, that of unlike texts of padding.

    Args:
        times: seconds of each of `CALLS`.
        limit: tokens of a text that the model reads at most.

    Returns:
        The cost, of which nothing is less than 0, whatever was timed.
    """
    small, large, mixed = (_read_of(call, limit) for call in (SHORT, MANY, MIXED))
    per_token = (times[MANY] - times[SHORT]) / (sum(large) - sum(small))
    overhead = times[SHORT] - per_token * sum(small)
    if per_token <= 0 or overhead > per_token * _MOST_OVERHEAD:
        return CallCost(_MOST_OVERHEAD)
    overhead = max(0.0, overhead)
    padding = len(mixed) * max(mixed) - sum(mixed)
    if padding == 0:
        return CallCost(overhead / per_token)
    of_padding = times[MIXED] - overhead - per_token * sum(mixed)
    return CallCost(overhead / per_token, min(1.0, max(0.0, of_padding / (per_token * padding))))


def _spoken(times: Mapping[Call, float]) -> str:
    return "/".join(f"{times[call] * 1e3:.1f}" for call in CALLS)
