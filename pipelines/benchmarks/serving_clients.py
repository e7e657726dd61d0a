"""Clients of a served model, all in one process: each waits for its answer before it asks again."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import numpy as np

_TIMEOUT_S = 120.0


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: from the first request to the last answer.
        latencies_s: of each answer with status 200.
        faults: other statuses, and kinds of errors where no answer came, with their numbers.
        num_texts: that were answered.
    """

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    num_texts: int = 0

    @property
    def texts_per_s(self) -> float:
        """Texts that were answered in a second."""
        return self.num_texts / self.seconds

    def latency_ms(self, part: float) -> float:
        """Milliseconds below which a part of the answers came; NaN without any."""
        if not self.latencies_s:
            return float("nan")
        return float(np.quantile(self.latencies_s, part)) * 1e3


async def send_all(url: str, requests: Sequence[Sequence[str]], num_clients: int) -> Load:
    """Send requests of texts, as many at once as there are clients."""
    bodies = [json.dumps({"inputs": list(texts)}).encode() for texts in requests]
    load = Load()
    places = iter(range(len(bodies)))
    begin = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        for place in places:
            start = time.perf_counter()
            try:
                fault = await _send(session, url, bodies[place], len(requests[place]))
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                fault = type(error).__name__
            if fault:
                load.faults[fault] += 1
            else:
                load.latencies_s.append(time.perf_counter() - start)
                load.num_texts += len(requests[place])

    async with _session(num_clients) as session:
        await asyncio.gather(*(client(session) for _ in range(num_clients)))
    load.seconds = time.perf_counter() - begin
    return load


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, num_texts: int) -> str:
    """Send one request; what is wrong with the answer, empty for nothing."""
    async with session.post(url, data=body) as answer:
        content = await answer.read()
        if answer.status != 200:
            return f"status {answer.status}"
        found = len(json.loads(content)["predictions"])
        return "" if found == num_texts else "answers are missing"


@asynccontextmanager
async def _session(num_clients: int) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=num_clients),
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        headers={"Content-Type": "application/json"},
    ) as session:
        yield session
