"""Start HAProxy as Ray Serve asks, but with a configuration that listens where it should alone.

Serve takes this for HAProxy's binary. It runs by its path, and imports nothing of this package, so
that it starts at once.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_OWN_PORTS = ("frontend prometheus", "listen stats")
"""Sections with a port on all interfaces, without a login; Serve asks by its socket instead."""
_NOT_SERVED = (
    '    http-request return status 503 content-type application/json hdr Retry-After "1" '
    'string "{\\"error\\": \\"no model is served here now; ask again later\\"}"'
)
_HEAD_TIMEOUT = "    timeout http-request 30s"
"""A client that does not send the head of its request gives its connection back."""


def own_configuration(config: str, address: str, error_file: str) -> str:
    """Take out of Serve's configuration what this server does not want.

    Args:
        config: as Serve wrote it, or as this made it before.
        address: where requests come in.
        error_file: what is answered where a replica gives no answer.

    Returns:
        The configuration; a ValueError if it listens elsewhere, too.
    """
    lines = list(_own_lines(config, address, error_file))
    binds = [line.strip() for line in lines if re.match(r"\s*bind\s", line)]
    if binds != [f"bind {address}"]:
        raise ValueError(f"HAProxy has to listen at {address} alone, and not with {binds}")
    return "\n".join(lines) + "\n"


def _own_lines(config: str, address: str, error_file: str) -> Iterator[str]:
    section = ""
    for line in config.splitlines():
        if line and not line.startswith((" ", "#")):
            section = line.strip()
        if section in _OWN_PORTS:
            continue
        if section == "defaults" and line == _HEAD_TIMEOUT:
            continue
        words = line.split()
        if section == "global" and words[:1] == ["log"]:
            continue  # Each request to the machine's syslog.
        if section == "frontend http_frontend" and words[:1] == ["bind"]:
            yield f"    bind {address}"
        elif words[:1] == ["errorfile"]:
            yield f"    errorfile {words[1]} {error_file}"
        elif section == "backend default_backend" and words[:2] == ["http-request", "return"]:
            yield _NOT_SERVED
        else:
            yield line
        if line.strip() == "defaults" == section:
            yield _HEAD_TIMEOUT


def main(binary: str, address: str, error_file: str, *arguments: str) -> None:
    """Become HAProxy."""
    path = Path(arguments[arguments.index("-f") + 1])
    path.write_text(own_configuration(path.read_text(), address, error_file))
    # A ctrl-C is for the command, which lets HAProxy answer what came in.
    os.setsid()
    # It ends with the actor that started it, however that one ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
