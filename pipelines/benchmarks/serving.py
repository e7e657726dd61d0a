"""Load a served model with clients on loopback, and compare with the same model offline.

Offline the model has all texts at once and reads them in its best batches: sorted by length, in
batches of each of some sizes, and as the server plans them. It is also given no more texts at a
time than the clients have under way, each answered one followed by the next: what batches can gain
there if HTTP costs nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_dist.errors import ConfigError
from moe_dist.measure.latency import watch_other_work
from moe_dist.serving.batching import CallCost, next_batch, plan_batches
from moe_dist.serving.service import load_choice
from moe_dist.serving.session import Endpoint, ServingSession, ask_replica
from moe_dist.serving.settings import ServingSettings
from moe_dist.serving.speed import FormChoice, texts_of_lengths

from ..console import Console
from ..markdown import markdown_table
from ..serving.run import Serving, serving_settings
from .results import write_results
from .serving_clients import Load, send_all
from .sizes import below_one, cpu_threads

OFFLINE_SIZES = (8, 16, 32, 64)
MAX_OFFLINE_TEXTS = 2000
NUM_ALONE = 200
NUM_WARMUPS = 100
MEDIAN_TOKENS, SPREAD, MIN_TOKENS = 24, 0.8, 6
"""Lengths are log-normal, as those of sentences are."""


@dataclass(frozen=True)
class ServingBenchmark:
    """What to load, and how.

    Args:
        directory: of the model.
        form: as for `serve`.
        task: of several, the one to answer.
        num_clients: that each wait for their answer.
        num_requests: of all of them.
        num_texts: of a request.
        max_tokens: of the longest texts.
        port: of HTTP.
        num_threads: of the model, served and offline.
        max_batch_size: of the server.
        max_wait_ms: of the server.
        seed: of lengths and words.
    """

    directory: str
    form: str = "auto"
    task: str | None = None
    num_clients: int = 8
    num_requests: int = 10_000
    num_texts: int = 1
    max_tokens: int = 128
    port: int = 8000
    num_threads: int = 1
    max_batch_size: int = 32
    max_wait_ms: float = 0.0
    seed: int = 0

    @property
    def num_under_way(self) -> int:
        """Texts that can wait for the model at a time."""
        return self.num_clients * self.num_texts


@dataclass(frozen=True)
class Phase:
    """What the clients saw in half of the requests.

    Attributes:
        texts_per_s: answered.
        p50_ms: half of the answers came within it.
        p99_ms: all but a hundredth did.
        num_requests: that were sent.
        faults: what else than an answer came, with its number.
    """

    texts_per_s: float
    p50_ms: float
    p99_ms: float
    num_requests: int
    faults: dict[str, int]


@dataclass(frozen=True)
class ServingReport:
    """What was found.

    Attributes:
        form: of the model, and why.
        settings: what was asked for.
        alone_texts_per_s: offline, one text in a call.
        offline_texts_per_s: offline, in the best batches.
        offline_batches: which these were.
        waiting_texts_per_s: offline, with no more texts at a time than clients have under way.
        half_waiting_texts_per_s: offline, with half as many: while a call is computed, the others
            can wait, and no more.
        steady: half of the requests, undisturbed.
        reloading: the other half, with a reload in the middle.
        reload_s: that the reload took.
        mean_batch: texts in a call while undisturbed.
        padding_share: of the positions that the model read meanwhile.
        of_offline: the undisturbed throughput as a part of that of the best batches offline.
        of_waiting: as a part of that with as many texts as are under way.
        of_half_waiting: as a part of that with half as many.
        num_dropped: requests without their answer, in both halves.
        busy_cores: that other processes kept busy, the clients' and Ray's own among them.
    """

    form: str
    settings: ServingBenchmark
    alone_texts_per_s: float
    offline_texts_per_s: float
    offline_batches: str
    waiting_texts_per_s: float
    half_waiting_texts_per_s: float
    steady: Phase
    reloading: Phase
    reload_s: float
    mean_batch: float
    padding_share: float
    of_offline: float
    of_waiting: float
    of_half_waiting: float
    num_dropped: int
    busy_cores: float


def run(benchmark: ServingBenchmark, console: Console) -> ServingReport:
    """Time offline, then serve and load. A ConfigError if a setting does not fit."""
    faults = below_one(
        benchmark, "num_clients", "num_texts", "num_threads", "max_batch_size", "max_tokens"
    )
    if benchmark.num_requests < 2:
        faults.append("num_requests has to be at least 2: half of them are sent while it reloads")
    if faults:
        raise ConfigError(faults, source="benchmark serving")
    settings = serving_settings(
        Serving(
            benchmark.directory,
            {
                "form": benchmark.form,
                "task": benchmark.task,
                "threads": benchmark.num_threads,
                "max_batch_size": benchmark.max_batch_size,
                "max_wait_ms": benchmark.max_wait_ms,
                "max_texts": max(256, benchmark.num_texts),
                "max_body_bytes": 2**24,
            },
        ),
        console,
    )
    with cpu_threads(benchmark.num_threads), torch.inference_mode():
        choice = load_choice(settings)
        console.note(choice.reason)
        columns = _texts(choice, benchmark)
        offline = _Offline.of(choice, columns, benchmark)
    console.note(f"offline: {offline.best:.0f} texts/s in {offline.batches}")
    # The form that was measured, whatever looks fastest to the replica.
    served = settings.model_copy(update={"form": choice.form})
    requests = _requests(columns, benchmark)
    return _serve(benchmark, served, choice.reason, offline, requests, console)


def _texts(choice: FormChoice, benchmark: ServingBenchmark) -> list[list[str]]:
    rng = np.random.default_rng(benchmark.seed)
    number = min(benchmark.num_requests * benchmark.num_texts, MAX_OFFLINE_TEXTS)
    drawn = rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, number)
    lengths = np.clip(drawn, MIN_TOKENS, benchmark.max_tokens).astype(int).tolist()
    return texts_of_lengths(choice.model, lengths)


def _requests(columns: Sequence[Sequence[str]], benchmark: ServingBenchmark) -> list[list[Any]]:
    rows: list[Any] = list(zip(*columns, strict=True)) if len(columns) > 1 else list(columns[0])
    rng = np.random.default_rng(benchmark.seed + 1)
    size = (benchmark.num_requests, benchmark.num_texts)
    return [[rows[place] for place in own] for own in rng.integers(len(rows), size=size)]


@dataclass(frozen=True)
class _Offline:
    alone: float
    best: float
    batches: str
    waiting: float
    half_waiting: float

    @classmethod
    def of(
        cls, choice: FormChoice, columns: Sequence[Sequence[str]], benchmark: ServingBenchmark
    ) -> _Offline:
        """Time one text at a time, and all ways to make batches; texts per second."""
        lengths = choice.model.lengths(columns)
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        ways = {
            f"sorted batches of {size}": [
                order[first : first + size] for first in range(0, len(order), size)
            ]
            for size in OFFLINE_SIZES
        }
        ways["planned batches"] = plan_batches(lengths, max(OFFLINE_SIZES), choice.cost)
        alone = _rate(choice, columns, [[row] for row in range(min(NUM_ALONE, len(lengths)))])
        rates = {way: _rate(choice, columns, batches) for way, batches in ways.items()}
        best = max(rates, key=lambda way: rates[way])
        waiting, half_waiting = (
            _rate(
                choice,
                columns,
                batches_of_waiting(lengths, number, benchmark.max_batch_size, choice.cost),
            )
            for number in (benchmark.num_under_way, -(-benchmark.num_under_way // 2))
        )
        return cls(alone, rates[best], best, waiting, half_waiting)


def batches_of_waiting(
    lengths: Sequence[int], num_waiting: int, max_batch_size: int, cost: CallCost
) -> list[list[int]]:
    """Make the batches that a server makes if always so many texts wait for its model."""
    waiting = list(range(min(num_waiting, len(lengths))))
    batches = []
    while waiting:
        places = next_batch([lengths[row] for row in waiting], max_batch_size, cost)
        batches.append([waiting[place] for place in places])
        answered = set(batches[-1])
        first = waiting[-1] + 1
        waiting = [row for row in waiting if row not in answered]
        waiting += range(first, min(first + len(answered), len(lengths)))
    return batches


def _rate(
    choice: FormChoice, columns: Sequence[Sequence[str]], batches: Sequence[Sequence[int]]
) -> float:
    begin = time.perf_counter()
    for batch in batches:
        choice.model.answers([[column[row] for row in batch] for column in columns])
    return sum(map(len, batches)) / (time.perf_counter() - begin)


def _serve(
    benchmark: ServingBenchmark,
    settings: ServingSettings,
    form: str,
    offline: _Offline,
    requests: list[list[Any]],
    console: Console,
) -> ServingReport:
    url = f"http://127.0.0.1:{benchmark.port}/predict"
    clients = benchmark.num_clients
    half = len(requests) // 2
    with ServingSession(settings, Endpoint(port=benchmark.port), console.note) as session:
        session.deploy()
        asyncio.run(send_all(url, requests[:NUM_WARMUPS], clients))
        before = ask_replica()["done"]
        with watch_other_work() as look:
            steady = asyncio.run(send_all(url, requests[:half], clients))
            work = look()
        after = ask_replica()["done"]
        console.note(f"served: {steady.texts_per_s:.0f} texts/s; now with a reload")
        reloading, reload_s = asyncio.run(
            _with_reload(session, url, requests[half:], clients, steady)
        )
    done = {name: after[name] - before[name] for name in after}
    return ServingReport(
        form=form,
        settings=benchmark,
        alone_texts_per_s=offline.alone,
        offline_texts_per_s=offline.best,
        offline_batches=offline.batches,
        waiting_texts_per_s=offline.waiting,
        half_waiting_texts_per_s=offline.half_waiting,
        steady=_phase(steady),
        reloading=_phase(reloading),
        reload_s=reload_s,
        mean_batch=done["texts"] / max(1, done["calls"]),
        padding_share=done["padding"] / max(1, done["padding"] + done["tokens"]),
        of_offline=steady.texts_per_s / offline.best,
        of_waiting=steady.texts_per_s / offline.waiting,
        of_half_waiting=steady.texts_per_s / offline.half_waiting,
        num_dropped=sum(steady.faults.values()) + sum(reloading.faults.values()),
        busy_cores=work.busy_cores,
    )


async def _with_reload(
    session: ServingSession,
    url: str,
    requests: Sequence[Sequence[str]],
    num_clients: int,
    steady: Load,
) -> tuple[Load, float]:
    """Send requests, and reload meanwhile; they go on until it is over, however many that takes."""
    loop = asyncio.get_running_loop()
    begin = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        reload = loop.run_in_executor(pool, session.deploy)
        loads = [await send_all(url, requests, num_clients)]
        while not reload.done():
            loads.append(await send_all(url, requests[: 4 * num_clients], num_clients))
        await reload
        reload_s = time.perf_counter() - begin
        # Old replicas go now.
        loads.append(await send_all(url, requests[: 4 * num_clients], num_clients))
    return _joined(loads), reload_s


def _joined(loads: Sequence[Load]) -> Load:
    return Load(
        seconds=sum(load.seconds for load in loads),
        latencies_s=[time_s for load in loads for time_s in load.latencies_s],
        faults=sum((load.faults for load in loads), Counter()),
        num_texts=sum(load.num_texts for load in loads),
    )


def _phase(load: Load) -> Phase:
    return Phase(
        texts_per_s=load.texts_per_s,
        p50_ms=load.latency_ms(0.5),
        p99_ms=load.latency_ms(0.99),
        num_requests=len(load.latencies_s) + sum(load.faults.values()),
        faults=dict(load.faults),
    )


COLUMNS = ("phase", "texts/s", "p50 ms", "p99 ms", "requests", "without answer")


def to_rows(report: ServingReport) -> list[list[str]]:
    """Lay what the clients saw out, in the order of `COLUMNS`."""
    return [
        [
            name,
            f"{phase.texts_per_s:.1f}",
            f"{phase.p50_ms:.1f}",
            f"{phase.p99_ms:.1f}",
            str(phase.num_requests),
            str(sum(phase.faults.values())),
        ]
        for name, phase in (("undisturbed", report.steady), ("reloading", report.reloading))
    ]


def verdicts(report: ServingReport) -> list[str]:
    """Say what that comes to, in sentences."""
    steady = report.steady
    lines = [
        f"form: {report.form}",
        f"offline {report.offline_texts_per_s:.1f} texts/s in {report.offline_batches}, and "
        f"{report.alone_texts_per_s:.1f} one by one; served {report.of_offline:.2f} of the former",
        f"offline {report.waiting_texts_per_s:.1f} texts/s with no more than "
        f"{report.settings.num_under_way} texts at a time, as clients have under way; served "
        f"{report.of_waiting:.2f} of that",
        f"offline {report.half_waiting_texts_per_s:.1f} texts/s with half of these, as wait while "
        f"the others are computed; served {report.of_half_waiting:.2f} of that",
        f"p99 is {steady.p99_ms / steady.p50_ms:.1f} × p50",
        f"{report.mean_batch:.1f} texts in a call, {report.padding_share:.0%} padding",
        f"the reload took {report.reload_s:.1f} s; {report.num_dropped} requests of "
        f"{steady.num_requests + report.reloading.num_requests} had no answer",
    ]
    faults = Counter(steady.faults) + Counter(report.reloading.faults)
    return [*lines, *(f"{number} × {fault}" for fault, number in faults.items())]


def main(benchmark: ServingBenchmark, console: Console, output: Path | None = None) -> None:
    """Run the benchmark and print it; what `moe-dist benchmark serving` calls.

    Args:
        benchmark: what to measure.
        console: shows it.
        output: a directory for the same as JSON and Markdown.
    """
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError([f"--output {output} is a file; name a directory."], source="--output")
    report = run(benchmark, console)
    lines = [*markdown_table(COLUMNS, to_rows(report)), ""]
    lines += [f"- {sentence}" for sentence in verdicts(report)]
    for line in lines:
        console.result(line)
    if output is not None:
        write_results(output, "serving", report, "\n".join(lines) + "\n")
