"""A process that has imported what workers need, and becomes each of them by a fork.

    python -P -m moe_dist.workers.fork_server FILE MODULE...

Every worker, and every helper that Ray starts beside them, would import torch and the rest for
itself. Here one process does so once. Ray starts `fork_client.py` in place of Python; that sends
its command, environment and open files here, and lives as long as the process that is forked for
it. This serves a Ray on this machine only; where it does not answer, Ray's own way is taken.

It ends when its standard input does, which whoever started it holds open.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_NUM_FILES = 3
"""Standard input, output and error."""
_OOM_SCORE = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True)
class Request:
    """What a process is to become.

    Args:
        command: a Python file and its arguments.
        environment: all of its variables.
        directory: where it runs.
        niceness: its priority.
        oom_score: what the kernel adds to its score when memory is out.
        files: its standard input, output and error.
    """

    command: Sequence[str]
    environment: dict[str, str]
    directory: str
    niceness: int
    oom_score: int
    files: Sequence[int]

    def close(self) -> None:
        """Close its files."""
        for file in self.files:
            os.close(file)

    def become(self) -> None:
        """Turn this process into it; its whole life is this call."""
        for wanted, own in enumerate(self.files):
            os.dup2(own, wanted)
        self.close()
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, self.niceness)
            _OOM_SCORE.write_text(str(self.oom_score), encoding="ascii")
        _forget_the_server()
        script = self.command[0]
        sys.argv = list(self.command)
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


def _forget_the_server() -> None:
    """Renew what imported libraries took from the process that imported them.

    Ray is none of them: its library draws names at random when it is loaded, and two processes
    would draw the same ones.
    """
    if numpy := sys.modules.get("numpy"):
        # Random numbers that nobody seeded differ from process to process.
        numpy.random.seed()
    if fingerprint := sys.modules.get("datasets.fingerprint"):
        fingerprint.fingerprint_rng.seed()
    threads = _threads("OMP_NUM_THREADS")
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    from threadpoolctl import threadpool_limits

    limit = partial(threadpool_limits, _threads("OPENBLAS_NUM_THREADS", threads), user_api="blas")
    # Only the thread that set a limit may change it, while it lives; a worker's is another.
    setter = threading.Thread(target=limit)
    setter.start()
    setter.join()


def _threads(variable: str, otherwise: int | None = None) -> int:
    """Read how many threads the environment of a process asks for; else its cores."""
    given = os.environ.get(variable, "")
    return int(given) if given.isdecimal() else otherwise or len(os.sched_getaffinity(0))


class ForkServer:
    """Forks a process for each connection, and ends each of both with the other.

    Args:
        listener: a socket that listens.
        owner: a file that ends when nobody needs the server any more.
    """

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self._listener = listener
        self._owner = owner
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(owner, selectors.EVENT_READ)
        # Both ends of each pair: the connection of a process, and the process.
        self._pids: dict[socket.socket, int] = {}
        self._ends: dict[int, socket.socket] = {}

    def serve(self) -> Request | None:
        """Return in each forked process, with what it is to become; at the end with None."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    request = self._fork()
                    if request is not None:
                        return request
                elif key.fileobj == self._owner:
                    if not os.read(self._owner, 1):
                        return None
                elif isinstance(key.fileobj, socket.socket):
                    self._follow(key.fileobj)
                elif key.fd in self._ends:
                    self._reap(key.fd)

    def _fork(self) -> Request | None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return None  # Too many files are open; who asks waits.
        try:
            request = read_request(connection)
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()  # Whoever asked has died, and needs nothing.
            return None
        try:
            pid = os.fork()
        except OSError:
            _refuse(connection)
            request.close()
            return None
        if pid == 0:
            os.setpgid(0, 0)  # Ray ends a worker's whole group with it.
            self._leave()
            connection.close()
            return request
        request.close()
        try:
            end = os.pidfd_open(pid)
        except OSError:
            # Nobody could follow it.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            _refuse(connection)
            return None
        self._pids[connection], self._ends[end] = pid, connection
        self._selector.register(connection, selectors.EVENT_READ)
        self._selector.register(end, selectors.EVENT_READ)
        return None

    def _leave(self) -> None:
        """Close the server's files in a process that was forked from it."""
        self._selector.close()
        self._listener.close()
        for connection in self._pids:
            connection.close()
        for end in self._ends:
            os.close(end)

    def _follow(self, connection: socket.socket) -> None:
        """End a process whose client was ended."""
        if connection not in self._pids:
            return  # Both were, and the process was first.
        self._selector.unregister(connection)
        with suppress(ProcessLookupError):
            os.kill(self._pids[connection], signal.SIGKILL)

    def _reap(self, end: int) -> None:
        """Tell a client that its process is over."""
        self._selector.unregister(end)
        os.close(end)
        connection = self._ends.pop(end)
        _, status = os.waitpid(self._pids.pop(connection), 0)
        with suppress(KeyError):
            self._selector.unregister(connection)
        with suppress(OSError), connection:
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _refuse(connection: socket.socket) -> None:
    """Have a client become Python itself."""
    with suppress(OSError), connection:
        connection.sendall(b"no\n")


def import_all(modules: Sequence[str]) -> None:
    """Import what can be; who needs the rest meets the error too, and tells it."""
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)


def read_request(connection: socket.socket) -> Request:
    """Read what `fork_client.py` sends: a line of JSON, with three files."""
    received, files, _, _ = socket.recv_fds(connection, 2**16, _NUM_FILES)
    while received and not received.endswith(b"\n"):
        more = connection.recv(2**16)
        if not more:
            break
        received += more
    try:
        fields: dict[str, Any] = json.loads(received)
        return Request(files=files, **fields)
    except (ValueError, TypeError):
        for file in files:
            os.close(file)
        raise


def main(arguments: Sequence[str]) -> None:
    """Import the modules and serve; in a forked process, be what was asked for."""
    file, *modules = arguments
    with socket.socket(fileno=int(file)) as listener:
        address = Path(listener.getsockname())
        import_all(modules)
        # What is there by now is shared by all, as long as nobody writes to it.
        gc.freeze()
        request = ForkServer(listener, sys.stdin.fileno()).serve()
    if request is not None:
        request.become()
    else:
        # Its owner may have been killed.
        shutil.rmtree(address.parent, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
