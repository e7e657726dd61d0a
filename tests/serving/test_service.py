"""A service without a server: answers as the model's own, limits, cut texts, health."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertForQuestionAnswering

from moe_dist.errors import ConfigError, ConversionError
from moe_dist.inference.backends import Form
from moe_dist.inference.serving import TextModel, _load_pyfunc
from moe_dist.serving import service as service_module
from moe_dist.serving import speed
from moe_dist.serving.batching import BatchFacts, in_thread
from moe_dist.serving.service import AnsweringModel, TextService, load_choice
from moe_dist.serving.settings import ServingSettings
from moe_dist.tasks import TASK_KINDS
from tests.serving.tiny_service import NUM_POSITIONS, ask, save_tiny, send

TEXTS = ["the film was good", "dull", "the film was good and the film was bad", ""]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served") / "model")


def make(directory: Path, **changes: Any) -> TextService:
    hooks = {name: changes.pop(name) for name in ("on_batch", "on_cut") if name in changes}
    values = {"directory": str(directory), "form": "eager-fp32", "max_texts": 8} | changes
    settings = ServingSettings.of(**values)
    model = AnsweringModel.here(load_choice(settings), settings.threads)
    return TextService(model, settings, **hooks)


def answer_with(service: TextService, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setattr(service._queue, "answer", in_thread(answer, ThreadPoolExecutor(1)))


@pytest.fixture(scope="module")
def service(directory: Path) -> TextService:
    return make(directory)


def test_answers_are_those_of_the_model(service: TextService, directory: Path) -> None:
    expected = _load_pyfunc(str(directory), {"max_length": NUM_POSITIONS}).predict(TEXTS)
    found = ask(service, {"inputs": TEXTS})
    assert found.status == 200 and set(found.content) == {"predictions"}
    rows = json.loads(json.dumps(found.content))["predictions"]
    for row, own in zip(rows, expected.to_dict("records"), strict=True):
        assert row["label"] == own["label"]
        assert row["scores"] == pytest.approx(own["scores"], abs=1e-6)
    assert np.ptp([row["score"] for row in rows]) > 1e-3


def test_no_texts_have_no_answers_as_with_mlflow(service: TextService) -> None:
    some: list[Any] = [[], {"text": []}]
    for inputs in some:
        found = ask(service, {"inputs": inputs})
        assert (found.status, found.content) == (200, {"predictions": []})


def test_texts_that_are_cut_are_named(directory: Path) -> None:
    cut: list[int] = []
    service = make(directory, max_length=6, on_cut=cut.append)
    # With the two special tokens, four words are read.
    texts = ["the film was good", "the film was good and dull", "dull"]
    found = ask(service, {"inputs": texts})
    assert found.content["truncated"] == {"max_length": 6, "rows": [1]}
    first, second, _ = found.content["predictions"]
    assert first["score"] == pytest.approx(second["score"], abs=1e-6)
    assert cut == [1]
    assert "truncated" not in ask(service, {"inputs": texts[:1]}).content


def test_a_text_without_tokens_is_refused_by_its_number(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[BatchFacts] = []
    service = make(directory, on_batch=batches.append)
    monkeypatch.setattr(TextModel, "lengths", lambda self, columns: [len(t) for t in columns[0]])
    found = ask(service, {"inputs": ["dull", ""]})
    assert (found.status, found.content) == (400, {"error": "text 1 has no tokens; leave it out"})
    assert not batches
    # A language model begins with its end token then.
    assert TASK_KINDS["causal_lm"].reads_nothing and not TASK_KINDS["classification"].reads_nothing


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        ({"path": "/nothing"}, 404, "there is nothing at /nothing; use POST /predict, GET /health"),
        ({"path": "/"}, 404, "there is nothing at /"),
        ({"method": "GET"}, 405, "/predict takes POST, not GET"),
        ({"path": "/health"}, 405, "/health takes GET, not POST"),
        ({"kind": None}, 415, "Content-Type"),
        ({"raw": b"{"}, 400, "no JSON"),
        ({"raw": b'{"\\ud800": 1}'}, 400, "`inputs` alone, and is ?"),
        ({"content": {"inputs": ["a" * 100_001]}}, 413, "100001 characters"),
        ({"content": {"inputs": ["a"] * 9}}, 413, "has 9 texts, and a request may have 8"),
        ({"content": {"inputs": [["a", "b", "c"]]}}, 400, "one or two columns of texts"),
        ({"content": {"inputs": ["a", ["b", "c"]]}}, 400, "one or two columns of texts"),
        ({"content": {"inputs": [[]]}}, 400, "one or two columns of texts"),
        # Would make as many columns of all rows.
        ({"content": {"inputs": [[""] * 250_000, "a"]}}, 400, "one or two columns of texts"),
    ],
)
def test_what_is_refused(
    service: TextService, request_: dict[str, Any], status: int, said: str
) -> None:
    found = ask(service, request_.pop("content", {"inputs": ["the"]}), **request_)
    assert found.status == status
    assert set(found.content) == {"error"} and said in json.loads(found.body)["error"]
    if status == 405:
        assert found.headers["Allow"].split(", ")[0] in ("POST", "GET")


def test_a_fault_of_the_model_shows_nothing_of_the_program(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = make(directory)
    whole = TextModel.answers

    def fail(self: TextModel, columns: Any) -> Any:
        if "bad" in columns[0]:
            raise RuntimeError(f"secret of {columns}")
        return whole(self, columns)

    # The queue holds the method as it was.
    own: Any = service._reader
    answer_with(service, monkeypatch, lambda columns: fail(own, columns))
    with caplog.at_level(logging.ERROR):
        found = ask(service, {"inputs": ["the", "bad"]})
    assert found.status == 500 and "secret" not in json.dumps(found.content)
    assert "secret of" in caplog.text
    assert ask(service, {"inputs": ["the"]}).status == 200


def test_questions_read_all_of_a_long_context_in_any_order_of_columns(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", BertForQuestionAnswering)
    service = make(directory, max_length=10, options={"stride": 2})
    contexts = ["the film was good", "the film was good and the film was bad and dull"]
    pairs = [["film", context] for context in contexts]
    rows = [{"context": context, "question": "film"} for context in contexts]
    columns = {"context": contexts, "question": ["film"] * 2}
    settings = {"max_length": 10, "options": {"stride": 2}}
    expected = _load_pyfunc(str(directory), settings).predict(pairs)["score"].tolist()
    for inputs in (pairs, rows, columns):
        found = ask(service, {"inputs": inputs})
        assert found.status == 200 and set(found.content) == {"predictions"}
        scores = [row["score"] for row in found.content["predictions"]]
        assert scores == pytest.approx(expected, abs=1e-5)
    assert service.describe()["max_length"] is None
    # What only the model can refuse comes back by its request alone.
    found = ask(service, {"inputs": ["film"]})
    assert found.status == 400 and "question and a context" in found.content["error"]
    found = ask(service, {"inputs": [["film " * 9, "the film was good and dull"]]})
    assert found.status == 400 and "leaves" in found.content["error"]


def test_health_is_there_only_while_the_model_answers(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make(directory)
    found = ask(service, path="/health", method="GET")
    assert found.status == 200
    assert found.content == {"status": "ok", **service.describe()}
    assert ask(service, path="/health", method="HEAD").status == 200

    hold = threading.Event()
    monkeypatch.setattr(service_module, "PROBE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(service_module, "FRESH_S", -1.0)
    answer_with(service, monkeypatch, lambda columns: hold.wait(20))
    found = ask(service, path="/health", method="GET")
    hold.set()
    assert found.status == 503 and "no answer" in found.content["error"]
    assert found.headers["Retry-After"] == "5"


def test_a_replica_whose_call_never_ends_is_not_healthy(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make(directory)
    service.check()
    monkeypatch.setattr(service_module, "STUCK_S", -1.0)
    with pytest.raises(RuntimeError, match="a call of the model runs"):
        service.check()


def test_requests_at_once_share_calls_and_are_counted(directory: Path) -> None:
    facts: list[BatchFacts] = []
    service = make(directory, on_batch=facts.append, max_wait_ms=500, max_batch_size=4)

    async def act() -> list[Any]:
        sends = (send(service, {"inputs": [text]}) for text in TEXTS)
        return await asyncio.gather(*sends)

    found = asyncio.run(act())
    assert [one.status for one in found] == [200] * 4
    assert len(facts) < 4 and sum(one.num_texts for one in facts) == 4
    assert sum(one.num_tokens for one in facts) == 6 + 3 + 11 + 2
    done = service.report()["done"]
    assert (done["texts"], done["tokens"], done["calls"]) == (4, 22, len(facts))
    assert done["padding"] == sum(one.num_padded for one in facts)


def test_a_length_that_the_model_cannot_read_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="reads at most 24 tokens, and it is 25"):
        make(directory, max_length=25)
    assert make(directory).describe()["max_length"] == NUM_POSITIONS


def test_the_fastest_form_is_taken_and_all_are_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        # Fastest for a short text, and not by the product of all.
        "eager-fp32": dict(zip(speed.CALLS, (0.001, 0.010, 0.080, 0.080), strict=True)),
        "lean-fp32": dict(zip(speed.CALLS, (0.002, 0.005, 0.010, 0.008), strict=True)),
    }
    prepare = Form.prepare

    def prepared(self: Form, model: Any) -> Any:
        if str(self) not in given:
            raise ConversionError(f"no {self} here")
        return prepare(Form(), model)

    monkeypatch.setattr(Form, "prepare", prepared)
    monkeypatch.setattr(
        speed, "time_forms", lambda models: {name: given[name] for name in list(models)}
    )
    reason = make(directory, form="auto").report()["reason"]
    assert reason.startswith(
        "lean-fp32, the fastest here; ms for 1 short, 1 long, 8 long, 1 long and 7 short texts: "
        "eager-fp32 1.0/10.0/80.0/80.0; lean-fp32 2.0/5.0/10.0/8.0; "
    )
    assert "lean-bf16 is not there (no lean-bf16 here)" in reason
    assert make(directory, form="eager-fp32").report()["reason"].startswith("eager-fp32, as asked")


@pytest.mark.parametrize("padding_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("limit", [None, 64, 17, 8])
def test_what_padding_costs_is_found_from_unlike_texts(
    limit: int | None, padding_share: float
) -> None:
    right = speed.CallCost(40.0, padding_share)

    def seconds(call: speed.Call) -> float:
        read = speed._read_of(call, limit)
        return 1e-4 * right.of(len(read), max(read), sum(read))

    found = speed.call_cost({call: seconds(call) for call in speed.CALLS}, limit)
    assert found.overhead_tokens == pytest.approx(right.overhead_tokens)
    assert found.padding_share == pytest.approx(right.padding_share, abs=1e-9)


def test_the_cost_is_that_of_texts_as_long_as_the_model_reads(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def call_cost(times: Any, limit: int | None) -> speed.CallCost:
        limits.append(limit)
        return speed.CallCost(20)

    monkeypatch.setattr(speed, "call_cost", call_cost)
    make(directory, max_length=5)
    assert limits == [5]


def test_where_no_text_is_padded_padding_costs_as_tokens_do() -> None:
    times = dict(zip(speed.CALLS, (0.001, 0.001, 0.008, 0.008), strict=True))
    assert speed.call_cost(times, limit=1).padding_share == 1
    # Faster than its tokens alone, as a machine may be for a moment.
    times = dict(zip(speed.CALLS, (0.001, 0.008, 0.064, 0.001), strict=True))
    assert speed.call_cost(times).padding_share == 0


def test_each_form_is_timed_with_each_call(directory: Path) -> None:
    model: Any = make(directory)._reader
    ((name, times),) = speed.time_forms({"only": model}).items()
    assert name == "only" and set(times) == set(speed.CALLS)
    assert all(0 < own < math.inf for own in times.values())


@pytest.mark.parametrize("form", ["nonsense", "fast-fp32", "lean-fp99", "", "auto-fp32"])
def test_a_form_that_there_is_not_is_refused_with_the_settings(form: str) -> None:
    with pytest.raises(ConfigError, match=r"form: .*there is no form .*write for example"):
        ServingSettings.of(directory="model", form=form)


def test_columns_whose_order_is_not_known_are_refused(service: TextService) -> None:
    assert ask(service, {"inputs": {"anything": ["the film"]}}).status == 200
    rows = [{"b": "the film", "a": "dull"}]
    some: list[Any] = [rows, {"b": ["the film"], "a": ["dull"]}]
    for inputs in some:
        found = ask(service, {"inputs": inputs})
        assert found.status == 400 and "which is the first is not known" in found.content["error"]


def test_only_the_columns_that_are_read_are_taken(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", BertForQuestionAnswering)
    service = make(directory, options={"stride": 2})
    given = {"question": ["film"], "context": ["the film was good"]}
    assert ask(service, {"inputs": given}).status == 200
    for inputs in (given | {"title": ["dull"]}, {"question": ["film"], "\ud800": ["good"]}):
        found = ask(service, {"inputs": inputs})
        assert found.status == 400 and "reads the columns question, context" in str(found.content)
        assert found.body


def test_long_texts_are_counted_beside_the_loop_and_nothing_else_meanwhile(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is for one thread at a time."""
    service = make(directory)
    long, short = "the film " * service_module.SHORT_CHARACTERS, "the"
    whole, held, began = TextModel.lengths, threading.Event(), threading.Event()
    threads: list[int] = []

    def slow(self: TextModel, columns: Any) -> list[int]:
        threads.append(threading.get_ident())
        began.set()
        assert held.wait(20)
        return whole(self, columns)

    monkeypatch.setattr(TextModel, "lengths", slow)

    async def act() -> list[Any]:
        tasks = [asyncio.create_task(send(service, {"inputs": [t]})) for t in (long, short)]
        while not began.is_set():
            await asyncio.sleep(0.001)
        # The loop goes on meanwhile.
        assert (await send(service, path="/nothing")).status == 404
        assert len(threads) == 1
        held.set()
        found = await asyncio.gather(*tasks)
        # Nobody is kept waiting by a short one.
        return [*found, await send(service, {"inputs": [short]})]

    assert [found.status for found in asyncio.run(act())] == [200, 200, 200]
    own = threading.get_ident()
    assert threads[0] == threads[1] != own and threads[2] == own


def test_a_number_that_is_not_finite_is_no_answer(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make(directory)
    answer_with(service, monkeypatch, lambda columns: [{"score": float("nan")}])
    found = ask(service, {"inputs": ["the"]})
    assert found.status == 500 and "the model failed" in found.content["error"]


def test_all_faults_of_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as fault:
        ServingSettings.of(
            directory="", threads=0, replicas=0, max_wait_ms=-1, speed=3, max_batch_size=257
        )
    text = str(fault.value)
    for name in ("directory", "threads", "replicas", "max_wait_ms", "speed", "max_batch_size"):
        assert name in text
