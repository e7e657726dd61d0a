"""What a body may be; each fault has its status and says what to send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from moe_dist.serving import requests as requests_module
from moe_dist.serving.requests import (
    HttpAnswer,
    HttpRequest,
    RequestFault,
    RequestLimits,
    parse_inputs,
)
from moe_dist.serving.requests import read_inputs as read
from tests.serving.tiny_service import pieces

LIMITS = RequestLimits(max_texts=4, max_body_bytes=50, max_characters=20_000)


def parse(inputs: Any) -> Any:
    return parse_inputs(json.dumps({"inputs": inputs}).encode(), LIMITS)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ([], []),
        ([["a", "b"], ["c", "d"]], [["a", "b"], ["c", "d"]]),
        ([{"q": "a", "c": "b"}, {"c": "d", "q": "e"}], {"q": ["a", "e"], "c": ["b", "d"]}),
        ({"q": ["a"], "c": ["b"]}, {"q": ["a"], "c": ["b"]}),
        ({"q": []}, {"q": []}),
        (["née 😀"], ["née 😀"]),
    ],
)
def test_what_is_taken(inputs: Any, expected: Any) -> None:
    assert parse(inputs) == expected


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "no JSON"),
        (b'{"inputs": ["a"', 400, r"no JSON: .* \(line 1, column 16\)"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b'{"inputs": [' + b"1" * 5000 + b"]}", 400, "no JSON|no text"),
        (b'["a"]', 400, "an object with `inputs` alone, and is no object"),
        (b"{}", 400, "`inputs` alone"),
        (b'{"inputs": ["a"], "params": {}}', 400, "and is inputs, params"),
        (b'{"instances": ["a"]}', 400, "and is instances"),
        (b'{"inputs": "a"}', 400, "neither a list nor columns"),
        (b'{"inputs": 3}', 400, "neither a list nor columns"),
        (b'{"inputs": ["a", 3]}', 400, "no text, at 1"),
        (b'{"inputs": [null]}', 400, "no text, at 0"),
        (b'{"inputs": [["a", 3]]}', 400, "no text, at 0"),
        (b'{"inputs": ["\\ud800"]}', 400, "half of a surrogate pair"),
        (b'{"inputs": {"a": "b"}}', 400, "have to be lists"),
        (b'{"inputs": {}}', 400, "have to be lists"),
        (b'{"inputs": {"a": ["b"], "c": []}}', 400, "not equally long"),
        (b'{"inputs": [{"a": "b"}, {"c": "d"}]}', 400, "not all the same names"),
        (b'{"inputs": [{"a": "b"}, "d"]}', 400, "not all the same names"),
        (b'{"inputs": [{}]}', 400, "not all the same names"),
        (b'{"inputs": [{"a": 1}]}', 400, "no text, at 0"),
        (b'{"inputs": [["a", "b", "c"]]}', 400, "a text or a pair, .* and has 3 at 0"),
        (b'{"inputs": ["a", [' + b'"",' * 999 + b'""]]}', 400, "has 1000 at 1"),
        (b'{"inputs": {"q": [["a", "b"]]}}', 400, "holds what is no text, at 0"),
        (b'{"\\ud800": 1}', 400, "`inputs` alone"),
        (
            b'{"inputs": ["' + b"a" * 20_001 + b'"]}',
            413,
            "20001 characters, and one may have 20000",
        ),
        (b'{"inputs": ["a", "a", "a", "a", "a"]}', 413, "has 5 texts, and a request may have 4"),
        (b'{"inputs": {"a": ["b", "b", "b", "b", "b"]}}', 413, "has 5 texts"),
    ],
)
def test_what_is_refused(body: bytes, status: int, said: str) -> None:
    with pytest.raises(RequestFault, match=said) as fault:
        parse_inputs(body, LIMITS)
    assert fault.value.status == status


def read_inputs(body: bytes, **headers: str) -> Any:
    own = {name.replace("_", "-"): value for name, value in headers.items()}
    request = HttpRequest("POST", "/predict", own, pieces(body))
    return asyncio.run(read(request, LIMITS))


def test_a_body_is_read_in_pieces_and_up_to_its_limit() -> None:
    body = b'{"inputs": ["' + b"a" * 35 + b'"]}'
    assert len(body) == 51
    shorter = body.replace(b"aa", b"a", 1)
    kind = "Application/JSON; charset=utf-8"
    assert read_inputs(shorter, content_type=kind) == ["a" * 34]
    for headers in ({}, {"content_length": "51"}, {"content_length": "nonsense"}):
        with pytest.raises(RequestFault, match="more than 50 bytes") as fault:
            read_inputs(body, content_type="application/json", **headers)
        assert fault.value.status == 413


def test_a_body_that_does_not_come_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "BODY_TIMEOUT_S", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    request = HttpRequest("POST", "/predict", {"content-type": "application/json"}, slow())
    with pytest.raises(RequestFault, match=r"did not come within 0\.05 s") as fault:
        asyncio.run(read(request, LIMITS))
    assert fault.value.status == 408 and fault.value.headers == {"Connection": "close"}


def test_an_answer_is_always_utf8_and_json() -> None:
    answer = HttpAnswer(400, {"error": "it is \ud800, née"})
    assert answer.body == '{"error": "it is ?, née"}'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        HttpAnswer(200, {"score": float("nan")})


def test_the_kind_of_body_is_asked_for() -> None:
    for headers in ({}, {"content_type": "application/x-www-form-urlencoded"}):
        with pytest.raises(RequestFault, match="Content-Type: application/json") as fault:
            read_inputs(b"{}", **headers)
        assert fault.value.status == 415
