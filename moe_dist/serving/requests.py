"""What a request asks, read and checked; a fault is one sentence and a status, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_COLUMNS = 2
BODY_TIMEOUT_S = 10.0
"""A body that takes longer to come holds a place that others wait for."""
EXAMPLE = 'send for example {"inputs": ["a fine film", "a dull one"]}'


class RequestFault(Exception):
    """A request that cannot be answered.

    Args:
        status: of HTTP.
        message: what is wrong, and what to send instead.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class RequestLimits:
    """How much one request may hold.

    Args:
        max_texts: texts, or pairs of them.
        max_body_bytes: of its body.
        max_characters: of one text.
    """

    max_texts: int
    max_body_bytes: int
    max_characters: int


@dataclass(frozen=True)
class HttpRequest:
    """A request, its body not read yet.

    Args:
        method: in capitals.
        path: below which nothing is mounted.
        headers: names in lower case.
        body: its pieces as they come.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


@dataclass(frozen=True)
class HttpAnswer:
    """An answer in JSON.

    Args:
        status: of HTTP.
        content: what it says; a ValueError if a number is not finite.
        headers: beside its length and kind.

    Attributes:
        body: the content as bytes.
    """

    status: int
    content: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Encode it here, so that what cannot be encoded is a fault of the request."""
        text = json.dumps(self.content, ensure_ascii=False, allow_nan=False)
        # Halves of surrogate pairs become question marks.
        object.__setattr__(self, "body", text.encode(errors="replace"))


async def read_inputs(request: HttpRequest, limits: RequestLimits) -> Any:
    """Read what `TextModel.columns` takes from a request's body, or raise a RequestFault."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestFault(
            415, f"the body is {kind or 'of no kind'}; send Content-Type: application/json"
        )
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await _read_body(request, limits.max_body_bytes)
    except TimeoutError:
        raise RequestFault(
            408,
            f"the body did not come within {BODY_TIMEOUT_S:g} s; send it at once",
            {"Connection": "close"},
        ) from None
    return parse_inputs(body, limits)


async def _read_body(request: HttpRequest, max_bytes: int) -> bytes:
    too_long = RequestFault(
        413,
        f"the body has more than {max_bytes} bytes; send fewer texts at once",
        {"Connection": "close"},
    )
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > max_bytes:
        raise too_long
    body = bytearray()
    async for piece in request.body:
        body += piece
        if len(body) > max_bytes:
            raise too_long
    return bytes(body)


def parse_inputs(body: bytes, limits: RequestLimits) -> Any:
    """Read `{"inputs": ...}`: texts, pairs, or rows or columns by name; see `read_inputs`."""
    try:
        document = json.loads(body)
    except json.JSONDecodeError as fault:
        said = f"{fault.msg} (line {fault.lineno}, column {fault.colno})"
        raise RequestFault(400, f"the body is no JSON: {said}; {EXAMPLE}") from None
    except (ValueError, RecursionError):
        # Bytes that are no text, numbers of thousands of digits, lists in lists without end.
        raise RequestFault(400, f"the body is no JSON that can be read; {EXAMPLE}") from None
    if not isinstance(document, dict) or set(document) != {"inputs"}:
        found = ", ".join(sorted(document)) if isinstance(document, dict) else "no object"
        raise RequestFault(
            400,
            f"the body has to be an object with `inputs` alone, and is {found[:200]}; {EXAMPLE}",
        )
    inputs = document["inputs"]
    if not isinstance(inputs, list | dict):
        raise RequestFault(400, f"`inputs` is neither a list nor columns by name; {EXAMPLE}")
    inputs = _columns_by_name(inputs)
    rows = next(iter(inputs.values()), []) if isinstance(inputs, dict) else inputs
    if len(rows) > limits.max_texts:
        raise RequestFault(
            413,
            f"`inputs` has {len(rows)} texts, and a request may have {limits.max_texts}; "
            "send fewer",
        )
    if isinstance(inputs, dict):
        for column in inputs.values():
            _check_texts([[text] for text in column], limits)
    else:
        _check_texts(inputs, limits)
    return inputs


def _columns_by_name(inputs: list[Any] | dict[str, Any]) -> list[Any] | dict[str, list[Any]]:
    """Turn rows with names into columns; texts and plain rows are left as they are."""
    if isinstance(inputs, dict):
        if not inputs or not all(isinstance(column, list) for column in inputs.values()):
            raise RequestFault(400, f"columns of `inputs` have to be lists; {EXAMPLE}")
        if len({len(column) for column in inputs.values()}) > 1:
            raise RequestFault(400, "columns of `inputs` are not equally long")
        return inputs
    if not any(isinstance(row, dict) for row in inputs):
        return inputs
    names = inputs[0].keys() if isinstance(inputs[0], dict) else None
    if not names or not all(isinstance(row, dict) and row.keys() == names for row in inputs):
        raise RequestFault(400, "rows of `inputs` have not all the same names")
    return {name: [row[name] for row in inputs] for name in names}


def _check_texts(rows: list[Any], limits: RequestLimits) -> None:
    """See that there are texts and pairs only, and that each is a text of Unicode, not too long."""
    for place, row in enumerate(rows):
        if isinstance(row, list) and len(row) > MAX_COLUMNS:
            raise RequestFault(
                400,
                f"a row of `inputs` is a text or a pair, for one or two columns of texts, and has "
                f"{len(row)} at {place}; {EXAMPLE}",
            )
        for text in row if isinstance(row, list) else [row]:
            if not isinstance(text, str):
                raise RequestFault(400, f"`inputs` holds what is no text, at {place}; {EXAMPLE}")
            if len(text) > limits.max_characters:
                raise RequestFault(
                    413,
                    f"a text of `inputs` has {len(text)} characters, and one may have "
                    f"{limits.max_characters}, at {place}; send a part of it",
                )
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RequestFault(
                    400, f"`inputs` holds half of a surrogate pair, which is no text, at {place}"
                ) from None
