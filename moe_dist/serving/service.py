"""A model behind HTTP: what each request is answered with. Whoever runs it brings the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.conversion.families import position_limit
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.inference.serving import MAX_LENGTH, TextModel, TextReader
from moe_dist.serving.batching import (
    Answer,
    Answerer,
    BatchFacts,
    BatchQueue,
    CallCost,
    ModelGoneError,
    in_thread,
)
from moe_dist.serving.requests import (
    HttpAnswer,
    HttpRequest,
    RequestFault,
    read_inputs,
)
from moe_dist.serving.settings import ServingSettings
from moe_dist.serving.speed import FormChoice, choose_form, probe_texts

PATHS = {"/predict": ("POST",), "/health": ("GET", "HEAD")}
FRESH_S = 1.0
"""An answer so long ago shows that the model answers."""
SHORT_CHARACTERS = 2000
"""So many are counted while other requests wait; it takes a fraction of a millisecond."""
PROBE_TIMEOUT_S = 10.0
RETRY_AFTER = "5"
"""Seconds, of an answer that tells a client to ask again."""
STUCK_S = 600.0
"""A call of the model that takes longer will not end."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnsweringModel:
    """A model that answers, in this process or in another.

    Args:
        reader: of its texts.
        answer: of a batch of them.
        form: that it is in, as it is written.
        cost: of a call.
        reason: why this form, in a line.
        check: raises a RuntimeError if it will answer no more.
    """

    reader: TextReader
    answer: Answerer
    form: str
    cost: CallCost
    reason: str
    check: Callable[[], None] = lambda: None

    @classmethod
    def here(cls, choice: FormChoice, num_threads: int) -> AnsweringModel:
        """Let a model answer in a thread of this process."""
        # OpenMP asks each thread for its own number of threads.
        executor = ThreadPoolExecutor(1, "model", torch.set_num_threads, (num_threads,))
        answer = in_thread(choice.model.answers, executor)
        return cls(choice.model, answer, choice.form, choice.cost, choice.reason)


class TextService:
    """Answers requests to one model.

    Args:
        model: in its form.
        settings: how it is served.
        on_batch: told of each call of the model.
        on_cut: told how many texts of a request were cut.
    """

    def __init__(
        self,
        model: AnsweringModel,
        settings: ServingSettings,
        *,
        on_batch: Callable[[BatchFacts], None] = lambda facts: None,
        on_cut: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._model = model
        self._reader = model.reader
        self._settings = settings
        self._on_cut = on_cut
        self._on_batch = on_batch
        self._done = {"calls": 0, "texts": 0, "tokens": 0, "padding": 0}
        self._queue = BatchQueue(
            model.answer,
            model.cost,
            settings.max_batch_size,
            settings.max_wait_ms / 1e3,
            self._count,
        )
        # A long text must not keep the others waiting; the tokenizer is for one thread.
        self._counting = ThreadPoolExecutor(1, "lengths")
        self._last_count: Future[list[int]] | None = None
        self._probe = [column[0] for column in probe_texts(self._reader, (4,))]

    async def handle(self, request: HttpRequest) -> HttpAnswer:
        """Answer any request; nothing is raised, and no answer tells of the program's inside."""
        try:
            methods = PATHS.get(request.path)
            if methods is None:
                known = ", ".join(f"{own[0]} {path}" for path, own in PATHS.items())
                raise RequestFault(404, f"there is nothing at {request.path[:100]}; use {known}")
            if request.method not in methods:
                raise RequestFault(
                    405,
                    f"{request.path} takes {methods[0]}, not {request.method}",
                    {"Allow": ", ".join(methods)},
                )
            if request.path == "/health":
                return await self._health()
            return await self._predict(request)
        except RequestFault as fault:
            return HttpAnswer(fault.status, {"error": fault.message}, fault.headers)
        except MoeDistError as fault:
            said = f"{fault.message}; {fault.remedy}" if fault.remedy else fault.message
            return HttpAnswer(400, {"error": said})
        except ModelGoneError as fault:
            log.error("%s", fault)
            said = "the model has ended, and is started again; ask again later"
            return HttpAnswer(503, {"error": said}, {"Retry-After": RETRY_AFTER})
        except Exception:
            log.exception("a request could not be answered")
            return HttpAnswer(
                500, {"error": "the model failed on this request; the replica's log says why"}
            )

    def describe(self) -> dict[str, Any]:
        """Say what is served, in plain values."""
        return {
            "form": self._model.form,
            "max_length": self._reader.limit,
            "task": self._reader.kind.name,
            "version": self._settings.version,
        }

    def report(self) -> dict[str, Any]:
        """Say also why in this form, and what was read: `calls`, `texts`, `tokens`, `padding`."""
        return {**self.describe(), "reason": self._model.reason, "done": dict(self._done)}

    def check(self) -> None:
        """Raise a RuntimeError if the model hangs or has ended."""
        self._model.check()
        if self._queue.call_s > STUCK_S:
            raise RuntimeError(f"a call of the model runs for {self._queue.call_s:.0f} s")

    def _count(self, facts: BatchFacts) -> None:
        for name, number in zip(
            self._done, (1, facts.num_texts, facts.num_tokens, facts.num_padded), strict=True
        ):
            self._done[name] += number
        self._on_batch(facts)

    async def _health(self) -> HttpAnswer:
        if not self._queue.answered_within(FRESH_S):
            try:
                await asyncio.wait_for(
                    self._answer([[text] for text in self._probe]), PROBE_TIMEOUT_S
                )
            except TimeoutError:
                raise RequestFault(
                    503,
                    f"the model has given no answer for {PROBE_TIMEOUT_S:.0f} s",
                    {"Retry-After": RETRY_AFTER},
                ) from None
        return HttpAnswer(200, {"status": "ok", **self.describe()})

    async def _predict(self, request: HttpRequest) -> HttpAnswer:
        columns = self._reader.columns(await read_inputs(request, self._settings.limits))
        limit = self._reader.limit
        lengths = await self._lengths(columns) if columns[0] else []
        if 0 in lengths and not self._reader.kind.reads_nothing:
            # Here, since a batch of the model holds texts of others.
            raise RequestFault(400, f"text {lengths.index(0)} has no tokens; leave it out")
        cut = [row for row, length in enumerate(lengths) if limit is not None and length > limit]
        content: dict[str, Any] = {"predictions": await self._answer(columns, lengths)}
        if cut:
            self._on_cut(len(cut))
            content["truncated"] = {"max_length": limit, "rows": cut}
        return HttpAnswer(200, content)

    async def _lengths(self, columns: Sequence[Sequence[str]]) -> list[int]:
        is_idle = self._last_count is None or self._last_count.done()
        if is_idle and sum(len(text) for column in columns for text in column) <= SHORT_CHARACTERS:
            # Another thread costs more than they do.
            return self._reader.lengths(columns)
        self._last_count = self._counting.submit(self._reader.lengths, columns)
        # Whoever leaves must not make it look done while a text is still counted.
        return await asyncio.shield(asyncio.wrap_future(self._last_count))

    async def _answer(
        self, columns: Sequence[Sequence[str]], lengths: Sequence[int] | None = None
    ) -> list[Answer]:
        if lengths is None:
            lengths = await self._lengths(columns)
        limit = self._reader.limit
        rows = zip(*columns, strict=True)
        read = [length if limit is None else min(length, limit) for length in lengths]
        return await self._queue.submit(list(zip(rows, read, strict=True)))


def load_choice(settings: ServingSettings) -> FormChoice:
    """Load a model and choose its form; what does not fit is a MoeDistError."""
    model = load_model(settings.directory, task=settings.task)
    text_model = TextModel(
        model,
        load_tokenizer(settings.directory),
        max_length=_max_length(settings, position_limit(model)),
        options=settings.options,
        calibration=settings.calibration,
    )
    return choose_form(text_model, settings.form)


def _max_length(settings: ServingSettings, positions: int | None) -> int:
    wanted = settings.max_length
    if wanted is None:
        return MAX_LENGTH if positions is None else min(MAX_LENGTH, positions)
    if positions is not None and wanted > positions:
        raise ConfigError(
            [f"max_length: the model reads at most {positions} tokens, and it is {wanted}"],
            source="serve",
        )
    return wanted
