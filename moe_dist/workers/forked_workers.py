"""Starts the fork server of a local Ray, and tells Ray to take its processes from it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

DEVICES = Path("/dev")
_CLIENT = Path(__file__).with_name("fork_client.py")
_LONGEST_ADDRESS = 80
"""Of the directory for temporary files, in bytes: a Unix socket's may have 107."""


class ForkedWorkers:
    """The fork server of one Ray on this machine (`moe_dist.workers.fork_server`).

    Args:
        modules: what it imports, once for all workers.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="moe-dist-")
        self._address = str(Path(self._directory.name) / "fork")
        with socket.socket(socket.AF_UNIX) as listener:
            # Bound here, so that who asks before it has imported all waits for it.
            listener.bind(self._address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "moe_dist.workers.fork_server"),
                    *(str(listener.fileno()), *modules),
                ],
                stdin=subprocess.PIPE,
                # What libraries say when they are imported, workers say too.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                # Threads do not outlive a fork; a worker takes those that it reserved.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                # Ctrl-C is for who started the workers.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    @property
    def py_executable(self) -> str:
        """What Ray starts as Python; see its runtime environments."""
        return shlex.join([sys.executable, "-I", "-S", str(_CLIENT), self._address])

    def stop(self) -> None:
        """End the server; its workers end with Ray."""
        assert self._process.stdin is not None
        self._process.kill()  # It may still import, and has nothing to finish.
        self._process.wait()
        self._process.stdin.close()
        self._directory.cleanup()


def forked_workers(modules: Sequence[str]) -> ForkedWorkers | None:
    """Start a fork server where that is possible and of use; else None.

    Not where there is a GPU: a process cannot use CUDA that the one it was forked from has
    touched, and what libraries touch while they are imported is not ours to say.
    """
    others = ("kfd", "dxg")  # AMD's, and whatever Windows lends.
    has_gpu = any(DEVICES.glob("nvidia[0-9]*")) or any((DEVICES / one).exists() for one in others)
    fits = len(os.fsencode(tempfile.gettempdir())) < _LONGEST_ADDRESS
    if not modules or has_gpu or not fits or not _can_follow_processes():
        return None
    try:
        return ForkedWorkers(modules)
    except OSError:
        return None  # No Unix sockets here, or no process more; Ray's own way may yet do.


def _can_follow_processes() -> bool:
    """Tell whether this system has files for processes: Linux has, since 5.3."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True
