"""A model in a process of its own: the same answers, and what happens when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import MoeDistError
from moe_dist.serving import model_process
from moe_dist.serving.batching import CallCost, ModelGoneError
from moe_dist.serving.model_process import ModelProcess, start_model
from moe_dist.serving.service import AnsweringModel, TextService, load_choice
from moe_dist.serving.settings import ServingSettings
from tests.serving.tiny_service import ask, save_tiny

COLUMNS = [["the film was good", "dull", ""]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServingSettings:
    directory = save_tiny(tmp_path_factory.mktemp("served") / "model")
    return ServingSettings.of(directory=str(directory), form="eager-fp32", max_length=6)


@pytest.fixture
def process(settings: ServingSettings) -> Iterator[ModelProcess]:
    own = ModelProcess(settings)
    try:
        yield own
    finally:
        own.close()


def test_what_calls_cost_is_said_there_and_heard_here(
    settings: ServingSettings, process: ModelProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = process.loaded()
    assert set(loaded.cost) == {field.name for field in fields(CallCost)}
    told = replace(loaded, cost={"overhead_tokens": 12.5, "padding_share": 0.25})
    monkeypatch.setattr(ModelProcess, "loaded", lambda self: told)
    there = start_model(settings)
    there.check.__self__.close()  # type: ignore[attr-defined]
    assert there.cost == CallCost(12.5, 0.25)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while is_there(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_answers_faults_and_an_end(settings: ServingSettings) -> None:
    here = load_choice(settings)
    there = start_model(settings)
    process: ModelProcess = there.check.__self__  # type: ignore[attr-defined]
    assert (there.form, there.reader.limit) == ("eager-fp32", 6)
    assert there.reader.kind is here.model.kind
    assert there.reader.lengths(COLUMNS) == here.model.lengths(COLUMNS)
    assert there.cost.overhead_tokens > 0 and 0 <= there.cost.padding_share <= 1
    assert there.reason.startswith("eager-fp32, as asked")

    async def answered() -> list[Any]:
        # One after the other on the same socket, and a long one that comes in pieces.
        long = [["the film was good " * 5000] * 40]
        return [await there.answer(COLUMNS), len(await there.answer(long))]

    assert asyncio.run(answered()) == [here.model.answers(COLUMNS), 40]

    service = TextService(there, settings)
    assert ask(service, {"inputs": COLUMNS[0]}).status == 200
    # What the model raises is a fault of the call, and the next one is answered.
    with pytest.raises(RuntimeError, match="TypeError"):
        asyncio.run(there.answer([["a"], ["b"], ["c"]]))
    assert ask(service, {"inputs": ["dull"]}).status == 200
    service.check()

    process.process.kill()
    found = ask(service, {"inputs": COLUMNS[0]})
    assert (found.status, found.headers) == (503, {"Retry-After": "5"})
    assert found.content["error"].startswith("the model has ended, and is started again")
    with pytest.raises(ModelGoneError, match="has ended with SIGKILL"):
        service.check()


def test_what_cannot_be_loaded_is_said_as_here(tmp_path: Path) -> None:
    with pytest.raises(MoeDistError, match="is not a directory") as fault:
        start_model(ServingSettings.of(directory=str(tmp_path / "none")))
    assert fault.value.remedy == "give a model directory"


def test_a_process_that_ends_while_it_loads(
    process: ModelProcess, settings: ServingSettings
) -> None:
    process.process.send_signal(signal.SIGTERM)
    with pytest.raises(ModelGoneError, match="has ended with SIGTERM"):
        process.loaded()


def test_who_leaves_in_the_middle_of_a_call_leaves_no_answer_to_the_next(
    process: ModelProcess,
) -> None:
    process.loaded()

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.answer([["the film " * 20_000] * 50]), 0.01)

    asyncio.run(leave())
    with pytest.raises(ModelGoneError):
        asyncio.run(process.answer(COLUMNS))


def test_a_ctrl_c_is_for_whoever_asks(process: ModelProcess) -> None:
    process.loaded()
    process.process.send_signal(signal.SIGINT)
    assert len(asyncio.run(process.answer(COLUMNS))) == 3


def test_it_ends_with_whoever_asks(settings: ServingSettings) -> None:
    program = (
        "import os; from moe_dist.serving.model_process import ModelProcess; "
        "from moe_dist.serving.settings import ServingSettings; "
        f"own = ModelProcess(ServingSettings.of(**{settings.model_dump(mode='json')!r})); "
        "print(own.process.pid, flush=True); own.loaded(); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert run.returncode == -signal.SIGKILL
    wait_until_gone(int(run.stdout))


def test_a_process_that_does_not_end_is_killed(
    process: ModelProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_process, "_END_S", 0.1)
    process.process.send_signal(signal.SIGSTOP)
    process.close()
    assert not is_there(process.process.pid) and process.process.returncode == -signal.SIGKILL


def test_it_sees_what_is_on_the_path_here(
    settings: ServingSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    class Started(Exception):
        pass

    def start(command: list[str], **options: Any) -> Any:
        asked.update(options)
        raise Started

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", *sys.path])
    with pytest.raises(Started):
        ModelProcess(settings)
    assert asked["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    assert "" not in asked["env"]["PYTHONPATH"].split(os.pathsep)


def test_in_this_process_it_is_the_same(settings: ServingSettings) -> None:
    choice = load_choice(settings)
    model = AnsweringModel.here(choice, 1)
    assert asyncio.run(model.answer(COLUMNS)) == choice.model.answers(COLUMNS)
    model.check()
