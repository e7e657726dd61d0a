"""Processes that are forked from one which has imported what they need."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe_dist.workers import forked_workers as owner
from moe_dist.workers.forked_workers import ForkedWorkers, forked_workers
from pipelines.chain.chain import WORKER_IMPORTS

PRELOADED = ("colorsys", "not_there", "numpy")

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="this system has no file for a process"
)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkedWorkers]:
    os.environ["OF_THE_SERVER"] = "x"
    forked = ForkedWorkers(PRELOADED)
    del os.environ["OF_THE_SERVER"]
    yield forked
    forked.stop()


def client(
    server: ForkedWorkers, script: Path, *arguments: str, **options: Any
) -> subprocess.Popen[str]:
    """Start what Ray starts in place of `python SCRIPT ARGUMENT...`."""
    command = [*shlex.split(server.py_executable), str(script), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)


def written(tmp_path: Path, text: str) -> Path:
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    return script


TELL = """
import json, os, sys
import numpy
print(json.dumps({
    "name": __name__, "arguments": sys.argv, "imports_from": sys.path[0], "here": os.getcwd(),
    "variable": os.environ.get("OF_THE_CLIENT"), "stranger": os.environ.get("OF_THE_SERVER"),
    "niceness": os.nice(0), "was_there": "colorsys" in sys.modules, "parent": os.getppid(),
    "leads_its_group": os.getpgid(0) == os.getpid(),
    "files": len(os.listdir("/proc/self/fd")), "drawn": numpy.random.random(),
}))
print(sys.stdin.read(), file=sys.stderr)
sys.exit(7)
"""


def test_a_forked_process_is_as_if_python_had_been_started(
    server: ForkedWorkers, tmp_path: Path
) -> None:
    script = written(tmp_path, TELL)
    environment = os.environ | {"OF_THE_CLIENT": "one"}
    told = []
    for _ in range(2):
        process = client(
            server,
            script,
            "--a",
            "b c",
            stdin=subprocess.PIPE,
            cwd=tmp_path,
            env=environment,
            preexec_fn=lambda: os.nice(3),
        )
        out, err = process.communicate("what it reads", timeout=60)
        assert (process.returncode, err) == (7, "what it reads\n")
        told.append(json.loads(out))
    first, second = told
    expected = {
        "name": "__main__",
        "arguments": [str(script), "--a", "b c"],
        "imports_from": str(tmp_path),
        "here": str(tmp_path),
        "variable": "one",
        "stranger": None,
        "niceness": os.nice(0) + 3,
        "was_there": True,
        # Ray ends the group of a worker that has ended.
        "leads_its_group": True,
    }
    assert {key: first[key] for key in expected} == expected
    assert first["parent"] == server.pid
    # Its own three, and the one that lists them.
    assert first["files"] == 4
    # What nobody seeds differs, as between two processes.
    assert first["drawn"] != second["drawn"]


def test_who_ends_the_client_ends_the_process(server: ForkedWorkers, tmp_path: Path) -> None:
    script = written(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    process = client(server, script)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert gone(pid)


def test_a_process_that_is_killed_ends_its_client(server: ForkedWorkers, tmp_path: Path) -> None:
    script = written(tmp_path, "import os\nos.kill(os.getpid(), 9)")
    process = client(server, script)
    process.communicate(timeout=60)
    assert process.returncode == 256 - signal.SIGKILL


def test_where_no_server_answers_python_is_started(tmp_path: Path) -> None:
    forked = ForkedWorkers(PRELOADED)
    forked.stop()
    process = client(forked, written(tmp_path, TELL), stdin=subprocess.DEVNULL)
    told = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 7
    assert (told["was_there"], told["parent"]) == (False, os.getpid())


THREADS = """
import json, threading
import torch
from threadpoolctl import threadpool_info, threadpool_limits
blas = {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}
print(json.dumps([torch.get_num_threads(), sorted(blas)]))
thread = threading.Thread(target=threadpool_limits, args=(3,))
thread.start()
thread.join()
print({one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"})
"""


def test_threads_are_those_of_the_process_and_not_of_the_server(tmp_path: Path) -> None:
    server = ForkedWorkers(("torch", "numpy"))
    script = written(tmp_path, THREADS)
    told = []
    for threads in ("1", "2"):
        own = os.environ | {"OMP_NUM_THREADS": threads}
        own.pop("OPENBLAS_NUM_THREADS", None)
        process = client(server, script, stdin=subprocess.DEVNULL, env=own)
        first, later = process.communicate(timeout=60)[0].splitlines()
        told.append(json.loads(first))
        # As Ray Train's thread sets it.
        assert later == "{3}"
    server.stop()
    assert told == [[1, [1]], [2, [2]]]


IDS = """
import json
import threading
import ray.train.torch
from ray import PlacementGroupID, ActorID, JobID, TaskID, UniqueID, WorkerID

found = []

def draw():
    found.extend([UniqueID.from_random().hex(), WorkerID.from_random().hex()])
    found.append(PlacementGroupID.of(JobID.from_int(1)).hex())
    found.append(TaskID.for_fake_task(JobID.from_int(1)).hex())

draw()
thread = threading.Thread(target=draw)
thread.start()
thread.join()
print(json.dumps(found))
"""


def test_no_two_processes_draw_the_same_names_of_ray(tmp_path: Path) -> None:
    """They did where Ray's library was loaded before the fork: two jobs then shared workers."""
    server = ForkedWorkers(WORKER_IMPORTS)
    script = written(tmp_path, IDS)
    processes = [client(server, script, stdin=subprocess.DEVNULL) for _ in range(6)]
    told = [process.communicate(timeout=120) for process in processes]
    names = [name for out, err in told for name in json.loads(out or err)]
    server.stop()
    assert len(names) == 6 * 8
    assert len(set(names)) == len(names)


def test_the_server_ends_with_its_owner(tmp_path: Path) -> None:
    script = (
        "import os, time\n"
        "from moe_dist.workers.forked_workers import ForkedWorkers\n"
        "print(ForkedWorkers(()).pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script]
    own = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert gone(int(done.stdout))
    assert list(tmp_path.iterdir()) == []


def gone(pid: int) -> bool:
    """Wait for the end of a process that is not a child of this one."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_not_where_nothing_is_preloaded_nor_beside_a_gpu_nor_on_an_old_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert forked_workers(()) is None
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(owner, "DEVICES", tmp_path)
    assert forked_workers(("colorsys",)) is None
    (tmp_path / "nvidia0").unlink()
    forked = forked_workers(("colorsys",))
    assert forked is not None
    forked.stop()

    def missing(*_: object, **__: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    assert forked_workers(("colorsys",)) is None
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "Popen", missing)
    monkeypatch.setattr(owner, "DEVICES", tmp_path)
    assert forked_workers(("colorsys",)) is None
