"""What Ray starts in place of Python: asks the fork server to become the worker, and waits for it.

    python -I -S fork_client.py SOCKET PYTHON-FILE ARGUMENT...

It imports little, since it runs for every process of Ray. Where no server answers, or one that
cannot fork, it becomes Python itself.
"""

from __future__ import annotations

import json
import os
import socket
import sys

if False:  # `typing` takes longer than all of this.
    from typing import NoReturn


def main(address: str, command: list[str]) -> int:
    """Run a Python file with its arguments in a forked process; returns its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            with open("/proc/self/oom_score_adj", encoding="ascii") as stream:
                oom_score = int(stream.read())
        except OSError:
            become_python(command)
        request = {
            "command": command,
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "niceness": os.getpriority(os.PRIO_PROCESS, 0),
            "oom_score": oom_score,
        }
        line = (json.dumps(request) + "\n").encode()
        sent = socket.send_fds(connection, [line], [0, 1, 2])
        connection.sendall(line[sent:])
        status = connection.makefile().readline()
    if status == "no\n":
        become_python(command)
    return int(status) if status else 1


def become_python(command: list[str]) -> NoReturn:
    """Run a Python file in this process."""
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]) % 256)
