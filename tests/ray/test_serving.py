"""`moe-dist serve` as a process: answers, refusals, reloads under load, and an end without loss."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from moe_dist.inference.saving import MANIFEST
from moe_dist.inference.serving import _load_pyfunc
from pipelines.benchmarks.serving_clients import Load, send_all
from tests.serving.tiny_service import NUM_POSITIONS, save_tiny

pytestmark = pytest.mark.ray

TEXTS = ["the film was good", "dull", "the film was good and the film was bad", "bad film"]
START_TIMEOUT_S = 200.0


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


class Server:
    """The command, and what it has said."""

    model = ("--form", "lean-fp32", "--max-length", "12")
    limits = ("--max-ongoing", "4", "--max-queued", "8")

    def __init__(self, directory: Path) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        arguments = ["--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        arguments += [*self.model, *self.limits]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "serve", str(directory), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())

    def wait_for(self, pattern: str, times: int = 1) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while sum(bool(re.search(pattern, line)) for line in self.said) < times:
            assert self.process.poll() is None and time.monotonic() < end, "\n".join(self.said)
            time.sleep(0.05)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, content: Any = None, path: str = "/predict", raw: bytes | None = None
    ) -> tuple[int, Any]:
        data = raw if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as fault:
            return fault.code, json.loads(fault.read())

    def reload_with(self, directory: Path) -> None:
        """Give the command again, as the server said."""
        self.wait_for("another model in its place: ")
        line = next(one for one in self.said if "another model in its place: " in one)
        words = line.partition(": ")[2].split()
        variables = dict(word.split("=") for word in words if "=" in word)
        subprocess.run(
            [sys.executable, "-m", "pipelines", "serve", str(directory), "--reload", *self.model],
            env=os.environ | variables,
            check=True,
            timeout=START_TIMEOUT_S,
        )

    def version(self) -> str:
        return str(self.ask(path="/health")[1]["version"])


class Clients(threading.Thread):
    """Four of them, until they are told to stop."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.url = f"{server.url}/predict"
        self.over = threading.Event()
        self.load = Load()
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            load = asyncio.run(send_all(self.url, [TEXTS[:1], TEXTS[1:3]] * 4, 4))
            self.load.faults += load.faults
            self.load.num_texts += load.num_texts

    def stop(self) -> Load:
        self.over.set()
        self.join(60)
        return self.load


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("ray.serve")
    save_tiny(tmp_path / "model")
    server = Server(tmp_path / "model")
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            try:
                server.process.wait(60)
            except subprocess.TimeoutExpired:
                server.process.kill()


def scores(directory: Path) -> list[float]:
    found = _load_pyfunc(str(directory), {"max_length": NUM_POSITIONS}).predict(TEXTS)
    return list(found["score"])


def test_a_server_from_start_to_end(server: Server, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    server.wait_for("answering at")
    assert any("lean-fp32, as asked" in line for line in server.said)
    assert any("texts are cut after 12 tokens" in line for line in server.said)

    status, found = server.ask({"inputs": TEXTS})
    assert status == 200
    own = [row["score"] for row in found["predictions"]]
    assert own == pytest.approx(scores(directory), abs=1e-5)
    status, found = server.ask({"inputs": ["the film " * 9]})
    assert found["truncated"] == {"max_length": 12, "rows": [0]}

    for path, raw, expected in (
        ("/predict", b"{", 400),
        ("/predict", b'{"inputs": [3]}', 400),
        ("/predict", json.dumps({"inputs": ["a"] * 300}).encode(), 413),
        ("/predict", b'{"inputs": ["' + b"a" * 2**20 + b'"]}', 413),
        ("/predict", None, 405),
        ("/other", None, 404),
    ):
        status, found = server.ask(path=path, raw=raw)
        assert status == expected and set(found) == {"error"}, (path, status)
        assert "Traceback" not in found["error"] and "moe_dist" not in found["error"]

    # More at once than the queue takes: told to come back, and the others are answered.
    statuses = asyncio.run(burst(f"{server.url}/predict", 40))
    refused = [retry_after for status, retry_after in statuses if status == 503]
    assert {status for status, _ in statuses} == {200, 503}
    assert set(refused) == {"1"}

    # Another model by another process: no request is lost, and the answers are the new one's.
    other = save_tiny(tmp_path / "other", seed=1)
    before = server.version()
    clients = Clients(server)
    server.reload_with(other)
    load = clients.stop()
    assert load.num_texts > 0 and not load.faults, load.faults
    assert server.version() != before
    own = [row["score"] for row in server.ask({"inputs": TEXTS})[1]["predictions"]]
    assert own == pytest.approx(scores(other), abs=1e-5)

    # The own directory again, which is damaged: refused, and what was served goes on.
    before = server.version()
    (directory / MANIFEST).write_text("{}")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("warning:")
    assert server.version() == before

    wait_for_metrics(f"http://127.0.0.1:{server.metrics_port}/metrics")

    # What is under way when it ends is answered.
    with ThreadedAsk(server, [TEXTS[0]] * 250) as last:
        time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
    assert last.found is not None and last.found[0] == 200
    assert len(last.found[1]["predictions"]) == 250
    assert server.process.wait(60) == 0, "\n".join(server.said)
    assert not any("Traceback" in line for line in server.said), "\n".join(server.said)


async def burst(url: str, number: int) -> list[tuple[int, str | None]]:
    """Status and Retry-After of requests that come at once."""

    async def one(session: aiohttp.ClientSession) -> tuple[int, str | None]:
        async with session.post(url, json={"inputs": TEXTS * 20}) as answer:
            assert "Traceback" not in await answer.text()
            return answer.status, answer.headers.get("Retry-After")

    async with aiohttp.ClientSession() as session:
        return await asyncio.gather(*(one(session) for _ in range(number)))


def wait_for_metrics(url: str) -> None:
    """Ray sends them every ten seconds."""
    names = (
        "moe_dist_texts_total",
        "moe_dist_padding_tokens_total",
        "moe_dist_truncated_texts_total",
        "moe_dist_batch_size_bucket",
        "serve_num_http_requests_total",
        "serve_num_http_error_requests_total",
        "serve_http_request_latency_ms_bucket",
    )
    end = time.monotonic() + 40
    while True:
        with urllib.request.urlopen(url, timeout=20) as answer:
            text = answer.read().decode()
        missing = [name for name in names if f"ray_{name}{{" not in text]
        if not missing:
            return
        assert time.monotonic() < end, missing
        time.sleep(1)


class ThreadedAsk:
    """One request in a thread; its answer when the block is over."""

    def __init__(self, server: Server, texts: list[str]) -> None:
        self.found: tuple[int, Any] | None = None
        self._server, self._texts = server, texts
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        self.found = self._server.ask({"inputs": self._texts})

    def __enter__(self) -> ThreadedAsk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
