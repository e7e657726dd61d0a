"""A model in a process of its own, so that it computes while requests are read beside it.

In one process they would take turns: whatever is Python in a call of the model waits for whatever
is Python of a request. Both ends of the socket are ours, on this machine, and nobody else can
reach them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch

from moe_dist.errors import MoeDistError
from moe_dist.inference.saving import load_tokenizer
from moe_dist.inference.serving import TextReader
from moe_dist.serving.batching import Answer, CallCost, Columns, ModelGoneError
from moe_dist.serving.service import AnsweringModel, load_choice
from moe_dist.serving.settings import ServingSettings
from moe_dist.tasks import TASK_KINDS

_END_S = 5.0
"""A process whose socket is closed ends by itself within it, or is killed."""
_END = b"\n"
"""Of a message, which is a line of JSON."""
_PIECE = 2**16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """What the process says of its model when it is ready."""

    kind: str
    limit: int | None
    form: str
    cost: Mapping[str, float]
    reason: str


class ModelProcess:
    """The process of a model, and the socket to it.

    Args:
        settings: how the model is served.

    Attributes:
        process: that was started; the model is loaded there.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self._socket, other = socket.socketpair()
        with other:
            call = f"from {__name__} import main; main({other.fileno()})"
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", call],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                # What was put on the path here, such as a job's directory, is there too.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        try:
            self._socket.sendall(_packed(settings.model_dump(mode="json")))
        except OSError as fault:
            self._has_ended(fault)

    def loaded(self) -> _Loaded:
        """Wait until the model is there; what it could not be loaded for is raised."""
        try:
            with self._socket.makefile("rb") as said:
                message = said.readline()
        except OSError as fault:
            self._has_ended(fault)
        if not message.endswith(_END):
            self._has_ended(None)
        self._socket.setblocking(False)
        return _Loaded(**_unpacked(message))

    async def answer(self, columns: Columns) -> Sequence[Answer]:
        """Answer the texts of one batch; what the model raised, or a ModelGoneError."""
        loop = asyncio.get_running_loop()
        try:
            await self._send(loop, _packed(columns))
            message = await self._read(loop)
        except (EOFError, OSError) as fault:
            self._has_ended(fault)
        except BaseException:
            # The next call would be given this one's answer.
            self.close()
            raise
        answers: Sequence[Answer] = _unpacked(message)
        return answers

    async def _send(self, loop: asyncio.AbstractEventLoop, data: bytes) -> None:
        # Now, since some loops first do all else that is ready, while the model does nothing.
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            await loop.sock_sendall(self._socket, data[sent:])

    async def _read(self, loop: asyncio.AbstractEventLoop) -> bytes:
        data = bytearray()
        while not data.endswith(_END):
            piece = await loop.sock_recv(self._socket, _PIECE)
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def check(self) -> None:
        """Raise a ModelGoneError if the process has ended."""
        if self.process.poll() is not None:
            self._has_ended(None)

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _has_ended(self, fault: BaseException | None) -> NoReturn:
        self.close()
        code = self.process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ModelGoneError(f"the model's process has ended with {how}") from fault


def start_model(settings: ServingSettings) -> AnsweringModel:
    """Load a model in a process of its own, which chooses its form.

    Args:
        settings: how it is served.

    Returns:
        The model, which answers there.

    Raises:
        MoeDistError: what does not fit, as `load_choice` raises it.
        ModelGoneError: if the process ends before the model is there.
    """
    own = ModelProcess(settings)
    try:
        loaded = own.loaded()
        # Faults of its files were found there.
        reader = TextReader(
            TASK_KINDS[loaded.kind],
            load_tokenizer(settings.directory),
            limit=loaded.limit,
            options=settings.options,
        )
    except BaseException:
        own.close()
        raise
    cost = CallCost(**loaded.cost)
    return AnsweringModel(reader, own.answer, loaded.form, cost, loaded.reason, own.check)


def main(file_descriptor: int) -> None:
    """Load the model that is asked for, and answer until nobody is there to ask."""
    # A ctrl-C is for the command, which ends this when all is answered.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(file_descriptor,), daemon=True).start()
    # Whoever asks may go.
    with (
        socket.socket(fileno=file_descriptor) as own,
        own.makefile("rb") as asked,
        contextlib.suppress(OSError),
    ):
        _answer_all(own, asked)


def _answer_all(own: socket.socket, asked: Iterator[bytes]) -> None:
    settings = ServingSettings.of(**json.loads(next(asked)))
    torch.set_num_threads(settings.threads)
    try:
        choice = load_choice(settings)
    except Exception as fault:
        own.sendall(_packed(_said(fault)))
        return
    model = choice.model
    loaded = _Loaded(
        kind=model.kind.name,
        limit=model.limit,
        form=choice.form,
        cost=asdict(choice.cost),
        reason=choice.reason,
    )
    # What is loaded stays; nothing of it is looked at again for garbage.
    gc.collect()
    gc.freeze()
    own.sendall(_packed({"answer": asdict(loaded)}))
    for line in asked:
        columns = json.loads(line)
        try:
            answer = _packed({"answer": model.answers(columns)})
        except Exception as fault:
            answer = _packed(_said(fault))
        own.sendall(answer)


def _end_with(file_descriptor: int) -> None:
    """End this process when the other end is closed, whatever the model is at."""
    watch = select.poll()
    watch.register(file_descriptor, select.POLLHUP)
    watch.poll()
    os._exit(0)


def _said(fault: Exception) -> dict[str, Any]:
    """Put a fault into plain values; what is not meant for users only into the log."""
    if isinstance(fault, MoeDistError):
        return {"fault": fault.message, "remedy": fault.remedy}
    log.error("the model failed", exc_info=fault)
    return {"failed": repr(fault)}


def _packed(message: Any) -> bytes:
    return json.dumps(message).encode() + _END


def _unpacked(data: bytes) -> Any:
    """Give what an answer holds, or raise the fault that it tells of."""
    message = json.loads(data)
    if "fault" in message:
        raise MoeDistError(message["fault"], remedy=message["remedy"])
    if "failed" in message:
        raise RuntimeError(message["failed"])
    return message["answer"]
