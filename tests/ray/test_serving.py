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
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from moe_dist.inference.saving import MANIFEST
from moe_dist.inference.serving import _load_pyfunc
from moe_dist.serving.haproxy import haproxy_binary
from pipelines.benchmarks.serving_clients import Load, send_all
from tests.serving.tiny_service import NUM_POSITIONS, save_tiny

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

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
            with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as answer:
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
        self.join(START_TIMEOUT_S)
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
                server.process.wait(200)
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

    # Bodies that do not come hold all places of the replica, and not for ever; more than the queue
    # takes meanwhile are told to come back, and the others are answered.
    statuses, slow = asyncio.run(burst(server, 40))
    refused = [retry_after for status, retry_after in statuses if status == 503]
    assert {status for status, _ in statuses} == {200, 503}
    assert set(refused) == {"1"}
    assert slow == [408] * 4

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

    # What a replica has taken when it ends is answered, late as the rest of it comes; with HAProxy
    # what waits for a replica, too.
    configurations = haproxy_configurations(server.port)
    assert bool(configurations) is (haproxy_binary() is not None)
    slow, others = asyncio.run(ended(server))
    assert set(slow) <= {200, 408}
    if configurations:
        assert set(others) <= {200, 503}, others
    assert server.process.wait(200) == 0, "\n".join(server.said)
    assert not haproxy_configurations(server.port)
    assert not any(path.exists() for path in configurations)
    assert not any("Traceback" in line for line in server.said), "\n".join(server.said)


class HalfSent:
    """A request whose body ends in the middle, until it is finished."""

    body = json.dumps({"inputs": [TEXTS[0]] * 250}).encode()

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        head = (
            "POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(self.body)}\r\n\r\n"
        )
        writer.write(head.encode() + self.body[:100])

    @classmethod
    async def to(cls, server: Server) -> HalfSent:
        own = cls(*await asyncio.open_connection("127.0.0.1", server.port))
        await own._writer.drain()
        return own

    def finish(self) -> None:
        self._writer.write(self.body[100:])

    async def status(self) -> int:
        """What it is answered with; 0 for no answer."""
        line = await self._reader.readline()
        self._writer.close()
        return int(line.split()[1]) if line else 0


async def post(session: aiohttp.ClientSession, server: Server) -> tuple[int, str | None]:
    """Status and Retry-After."""
    async with session.post(f"{server.url}/predict", json={"inputs": TEXTS * 20}) as answer:
        assert "Traceback" not in await answer.text()
        return answer.status, answer.headers.get("Retry-After")


async def burst(server: Server, number: int) -> tuple[list[tuple[int, str | None]], list[int]]:
    """What requests get that come at once, and four before them whose bodies do not come."""
    slow = [await HalfSent.to(server) for _ in range(4)]
    async with aiohttp.ClientSession() as session:
        found = await asyncio.gather(*(post(session, server) for _ in range(number)))
    return found, [await own.status() for own in slow]


def haproxy_configurations(port: int) -> set[Path]:
    """Those of all HAProxy processes that take requests there."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, ValueError):
            words = place.read_text().split("\0")
            path = Path(words[words.index("-f") + 1])
            if f"127.0.0.1:{port}\n" in path.read_text():
                found.add(path)
    return found


async def ended(server: Server) -> tuple[list[int], list[int | str]]:
    """What four requests get that a replica has taken when the server is told to stop.

    And what others get, most of which wait for a replica.
    """
    slow = [await HalfSent.to(server) for _ in range(4)]
    async with aiohttp.ClientSession() as session:
        others = [asyncio.create_task(post(session, server)) for _ in range(40)]
        # The queue is full only if all places of the replica are taken.
        for one in asyncio.as_completed(others):
            if (await one)[0] == 503:
                break
        server.process.send_signal(signal.SIGTERM)
        for own in slow:
            own.finish()
        statuses = [await own.status() for own in slow]
        rest = await asyncio.gather(*others, return_exceptions=True)
    return statuses, [own[0] if isinstance(own, tuple) else repr(own) for own in rest]


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
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with urllib.request.urlopen(url, timeout=START_TIMEOUT_S) as answer:
            text = answer.read().decode()
        missing = [name for name in names if f"ray_{name}{{" not in text]
        if not missing:
            return
        assert time.monotonic() < end, missing
        time.sleep(1)
