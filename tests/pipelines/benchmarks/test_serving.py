"""`moe-dist benchmark serving`: the parts that need no Ray; tests/ray has a server under load."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from moe_dist.serving.batching import CallCost
from pipelines.benchmarks import serving
from pipelines.benchmarks.serving import (
    ServingBenchmark,
    ServingReport,
    batches_of_waiting,
    to_rows,
    verdicts,
)
from pipelines.benchmarks.serving_clients import Load, send_all
from pipelines.cli import app
from pipelines.console import Console
from tests.serving.tiny_service import save_tiny

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def loaded(handler: Handler, requests: list[list[str]], clients: int) -> Load:
    """Send to a server of our own."""
    application = web.Application()
    application.router.add_post("/predict", handler)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        return await send_all(f"http://127.0.0.1:{port}/predict", requests, clients)
    finally:
        await runner.cleanup()


def test_each_request_is_sent_once_by_as_many_clients_as_there_are() -> None:
    seen, now, most = list[str](), [0], [0]

    async def answer(request: web.Request) -> web.StreamResponse:
        texts = (await request.json())["inputs"]
        seen.extend(texts)
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.01)
        now[0] -= 1
        return web.json_response({"predictions": [{} for _ in texts]})

    requests = [[f"{place}a", f"{place}b"] for place in range(20)]
    load = asyncio.run(loaded(answer, requests, 4))
    assert sorted(seen) == sorted(text for own in requests for text in own)
    assert most[0] == 4
    assert (load.num_texts, len(load.latencies_s), load.faults) == (40, 20, Counter())
    assert load.texts_per_s == pytest.approx(40 / load.seconds)
    assert load.latency_ms(0.5) >= 10
    assert load.latency_ms(0.99) >= load.latency_ms(0.5)


def test_what_is_no_answer_is_counted_by_what_it_is() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        (text,) = (await request.json())["inputs"]
        if text == "full":
            return web.Response(status=503)
        if text == "gone":
            assert request.transport is not None
            request.transport.close()
        return web.json_response({"predictions": [] if text == "lost" else [{}]})

    load = asyncio.run(loaded(answer, [["full"], ["gone"], ["lost"], ["fine"]], 1))
    assert load.num_texts == 1
    assert load.faults["status 503"] == 1 and load.faults["answers are missing"] == 1
    assert sum(load.faults.values()) == 3


def test_a_report_says_what_was_dropped(tmp_path: Path) -> None:
    report = ServingReport(
        form="lean-bf16, as asked",
        settings=ServingBenchmark("model"),
        alone_texts_per_s=50,
        offline_texts_per_s=200,
        offline_batches="planned batches",
        waiting_texts_per_s=190,
        half_waiting_texts_per_s=170,
        steady=serving.Phase(170, 10, 25, 100, {}),
        reloading=serving.Phase(90, 20, 60, 104, {"status 500": 3}),
        reload_s=8,
        mean_batch=4.5,
        padding_share=0.125,
        of_offline=0.85,
        of_waiting=0.89,
        of_half_waiting=0.99,
        num_dropped=3,
        busy_cores=0.5,
    )
    assert to_rows(report)[1] == ["reloading", "90.0", "20.0", "60.0", "104", "3"]
    said = "\n".join(verdicts(report))
    assert "served 0.85 of the former" in said and "p99 is 2.5 × p50" in said
    assert "190.0 texts/s with no more than 8 texts at a time" in said and "0.89 of that" in said
    assert "3 requests of 204 had no answer" in said and "3 × status 500" in said


def test_offline_all_ways_to_make_batches_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is sent are texts of the lengths that were drawn."""
    directory = save_tiny(tmp_path / "model")
    told: list[Any] = []
    monkeypatch.setattr(serving, "_serve", lambda *args: told.extend(args))
    benchmark = ServingBenchmark(
        str(directory), form="eager-fp32", num_requests=30, num_texts=2, max_tokens=20
    )
    serving.run(benchmark, Console(quiet=True))
    _, settings, reason, offline, requests, _ = told
    assert settings.form == "eager-fp32" and "eager-fp32, as asked" in reason
    assert offline.best > 0 and offline.alone > 0 and "batches" in offline.batches
    assert offline.waiting > 0
    assert len(requests) == 30 and {len(own) for own in requests} == {2}
    lengths = {len(text.split()) + 2 for own in requests for text in own}
    assert min(lengths) >= 5 and max(lengths) == 20 and len(lengths) > 5


def test_offline_no_more_texts_wait_than_are_under_way() -> None:
    cost = CallCost(overhead_tokens=10)
    # 5 and 50 cost more together; what is answered is followed by the next.
    lengths = [50, 5, 5, 5, 50, 5]
    found = batches_of_waiting(lengths, 3, 8, cost)
    assert found == [[0], [1, 2, 3], [4], [5]]
    assert batches_of_waiting(lengths, 3, 1, cost) == [[0], [1], [2], [3], [4], [5]]
    assert batches_of_waiting([5] * 5, 9, 8, cost) == [[0, 1, 2, 3, 4]]
    assert batches_of_waiting([], 3, 8, cost) == []


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    arguments = ["benchmark", "serving", str(tmp_path), "--clients", "0", "--requests", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "num_clients is 0" in result.output and "num_requests" in result.output
    file = tmp_path / "file"
    file.write_text(json.dumps({}))
    arguments = ["benchmark", "serving", str(tmp_path), "--output", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "is a file; name a directory" in result.output
