"""Texts of many requests in one call of the model, those of like length together.

What a call costs is measured (`CallCost`), so that padding, where the model computes on it, is
weighed against one more call, and no lengths of buckets need to be chosen.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

Answer = Mapping[str, Any]
Columns = Sequence[Sequence[str]]
"""One or two columns of texts."""
Answerer = Callable[[Columns], Awaitable[Sequence[Answer]]]
"""Answers each row of texts while others are read."""

_PLANNED_BATCHES = 4
"""As many full batches of the oldest texts are looked at together: planning stays quick."""

_AS_CHEAP = 1.01
"""So much more a plan may cost that reads the oldest first."""

log = logging.getLogger(__name__)


class ModelGoneError(RuntimeError):
    """The process of a model has ended."""


@dataclass(frozen=True)
class CallCost:
    """What a call of the model costs, in tokens.

    Args:
        overhead_tokens: what a call costs whatever it reads, in the time of so many tokens.
        padding_share: what a place without a token costs, as a part of a token's cost.
    """

    overhead_tokens: float
    padding_share: float = 1.0

    def of(self, num_texts: int, longest: int, num_tokens: int) -> float:
        """Cost of a call with texts of so many tokens together, padded to the longest."""
        padding = num_texts * longest - num_tokens
        return self.overhead_tokens + num_tokens + self.padding_share * padding


def plan_batches(lengths: Sequence[int], max_batch_size: int, cost: CallCost) -> list[list[int]]:
    """Split texts into batches that cost least together.

    The cheapest batches are runs of the texts in the order of their lengths; dynamic programming
    finds where one ends and the next begins.

    Args:
        lengths: tokens of each text.
        max_batch_size: texts of a batch at most.
        cost: of a call.

    Returns:
        Batches of places in `lengths`, the shortest texts first.
    """
    return _cheapest(lengths, max_batch_size, cost)[0]


def _cheapest(
    lengths: Sequence[int], max_batch_size: int, cost: CallCost
) -> tuple[list[list[int]], float]:
    """The batches of `plan_batches`, and what they cost together."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    least = [0.0]
    begins = [0]
    read = [0, *itertools.accumulate(lengths[place] for place in order)]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        options = [
            (least[begin] + cost.of(end - begin, longest, read[end] - read[begin]), begin)
            for begin in range(max(0, end - max_batch_size), end)
        ]
        best, begin = min(options)
        least.append(best)
        begins.append(begin)
    batches = []
    end = len(order)
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1], least[-1]


def next_batch(lengths: Sequence[int], max_batch_size: int, cost: CallCost) -> list[int]:
    """Choose what is read next of waiting texts; the oldest, which is the first, is always in it.

    That is its batch in the cheapest plan, or as many of the oldest as a call takes, where this and
    the plan for the others cost no more.

    Args:
        lengths: tokens of each text, the oldest first.
        max_batch_size: texts of a batch at most.
        cost: of a call.

    Returns:
        Places in `lengths`.
    """
    looked_at = lengths[: _PLANNED_BATCHES * max_batch_size]
    batches, total = _cheapest(looked_at, max_batch_size, cost)
    oldest = looked_at[:max_batch_size]
    if len(looked_at) > len(oldest):
        of_oldest = cost.of(len(oldest), max(oldest), sum(oldest))
        others = _cheapest(looked_at[max_batch_size:], max_batch_size, cost)[1]
        if of_oldest + others <= total * _AS_CHEAP:
            return list(range(len(oldest)))
    return next(own for own in batches if 0 in own)


@dataclass(eq=False)
class WaitingText:
    """A text, or a pair, that waits for its answer.

    Args:
        parts: the text, or the two of a pair.
        num_tokens: that the model reads of it.
        answer: where its answer comes.
    """

    parts: tuple[str, ...]
    num_tokens: int
    answer: asyncio.Future[Answer]


@dataclass(frozen=True)
class BatchFacts:
    """What a call of the model had to read.

    Attributes:
        num_texts: rows.
        num_tokens: of the texts.
        num_padded: positions beside them.
    """

    num_texts: int
    num_tokens: int
    num_padded: int


@dataclass
class BatchQueue:
    """Collects texts while the model works, and hands it the next batch; one call at a time.

    The oldest text is always in the next batch, so that none waits for ever. A text that cannot be
    answered fails alone.

    Args:
        answer: is given one batch at a time, since the model uses all of its cores in a call.
        cost: of a call.
        max_batch_size: texts of a call at most.
        max_wait_s: how long an idle model waits for more texts than the first one.
        on_batch: told of each call that succeeded.
    """

    answer: Answerer
    cost: CallCost
    max_batch_size: int
    max_wait_s: float
    on_batch: Callable[[BatchFacts], None] = lambda facts: None
    _waiting: list[WaitingText] = field(default_factory=list)
    _worker: asyncio.Task[None] | None = None
    _grown: asyncio.Event | None = None
    _call_began: float | None = None
    _last_answer: float | None = None

    async def submit(self, rows: Sequence[tuple[tuple[str, ...], int]]) -> list[Answer]:
        """Answer texts, given with the tokens of each; raises what the first that failed raised."""
        loop = asyncio.get_running_loop()
        texts = [WaitingText(parts, tokens, loop.create_future()) for parts, tokens in rows]
        self._waiting += texts
        if self._grown is not None:
            self._grown.set()
        if texts and (self._worker is None or self._worker.done()):
            self._worker = loop.create_task(self._work())
        try:
            found = await asyncio.gather(*(text.answer for text in texts), return_exceptions=True)
        finally:
            # Whoever left does not want its texts read.
            gone = {id(text) for text in texts}
            self._waiting = [text for text in self._waiting if id(text) not in gone]
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if not isinstance(one, BaseException)]

    @property
    def call_s(self) -> float:
        """Seconds since the call that runs now began; 0 if none does."""
        return 0.0 if self._call_began is None else time.monotonic() - self._call_began

    def answered_within(self, seconds: float) -> bool:
        """Tell whether the model has answered lately."""
        return self._last_answer is not None and time.monotonic() - self._last_answer <= seconds

    async def _work(self) -> None:
        try:
            if self.max_wait_s > 0:
                await self._wait_for_more()
            while self._waiting:
                await self._call(self._next_batch())
        except BaseException as fault:
            _fail(self._waiting, _end_of_queue(fault))
            raise

    async def _wait_for_more(self) -> None:
        end = time.monotonic() + self.max_wait_s
        while len(self._waiting) < self.max_batch_size:
            self._grown = asyncio.Event()
            try:
                await asyncio.wait_for(self._grown.wait(), end - time.monotonic())
            except TimeoutError:
                return

    def _next_batch(self) -> list[WaitingText]:
        """Take the batch out that has the oldest text in it."""
        width = len(self._waiting[0].parts)
        alike = [text for text in self._waiting if len(text.parts) == width]
        lengths = [text.num_tokens for text in alike]
        batch = [alike[place] for place in next_batch(lengths, self.max_batch_size, self.cost)]
        taken = {id(text) for text in batch}
        self._waiting = [text for text in self._waiting if id(text) not in taken]
        return batch

    async def _call(self, batch: Sequence[WaitingText]) -> None:
        """Answer a batch, or fail each of its texts."""
        try:
            await self._call_model(batch)
        except BaseException as fault:
            _fail(batch, _end_of_queue(fault))
            raise

    async def _call_model(self, batch: Sequence[WaitingText]) -> None:
        self._call_began = time.monotonic()
        try:
            answers = await self._answers(batch)
        except Exception as fault:
            if len(batch) > 1 and not isinstance(fault, ModelGoneError):
                half = len(batch) // 2
                await self._call_model(batch[:half])
                await self._call_model(batch[half:])
            else:
                _fail(batch, fault)
            return
        finally:
            self._call_began = None
        self._last_answer = time.monotonic()
        for text, answer in zip(batch, answers, strict=True):
            if not text.answer.done():
                text.answer.set_result(answer)
        # Later, so that the next call begins first.
        asyncio.get_running_loop().call_soon(self._count, _facts(batch))

    async def _answers(self, batch: Sequence[WaitingText]) -> Sequence[Answer]:
        columns = [list(column) for column in zip(*(text.parts for text in batch), strict=True)]
        answers = await self.answer(columns)
        if len(answers) != len(batch):
            raise RuntimeError(f"the model gave {len(answers)} answers to {len(batch)} texts")
        return answers

    def _count(self, facts: BatchFacts) -> None:
        try:
            self.on_batch(facts)
        except Exception:
            log.exception("a call of the model could not be counted")


def in_thread(answer: Callable[[Columns], Sequence[Answer]], executor: Executor) -> Answerer:
    """Let a model of this process answer in another thread, the only one of `executor`."""

    async def answered(columns: Columns) -> Sequence[Answer]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, _without_end, answer, columns)

    return answered


def _without_end(
    answer: Callable[[Columns], Sequence[Answer]], columns: Columns
) -> Sequence[Answer]:
    """Raise nothing that a future cannot hold."""
    try:
        return answer(columns)
    except BaseException as fault:
        if isinstance(fault, Exception) and not isinstance(fault, StopIteration):
            raise
        raise RuntimeError(f"the model ended with {fault!r}") from fault


def _fail(texts: Sequence[WaitingText], fault: Exception) -> None:
    """Let nobody wait for an answer that will not come."""
    for text in texts:
        if not text.answer.done():
            text.answer.set_exception(fault)


def _end_of_queue(fault: BaseException) -> RuntimeError:
    return RuntimeError(f"the queue ended: {fault!r}")


def _facts(batch: Sequence[WaitingText]) -> BatchFacts:
    lengths = [text.num_tokens for text in batch]
    return BatchFacts(len(batch), sum(lengths), len(batch) * max(lengths) - sum(lengths))
