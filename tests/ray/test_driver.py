"""Jobs on real Ray workers: results, errors, threads, and a worker that is killed.

The jobs are nested functions, which Ray sends by value: the workers know nothing of the tests.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ClusterError, NonFiniteLossError, TrainingError
from moe_dist.workers.attempts import WORKERS_NAME
from moe_dist.workers.driver import JobResult, run_on_workers
from moe_dist.workers.ray_session import RaySession, ray_session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    pytest.importorskip("ray")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPUs")
    with ray_session() as session:
        yield session


@pytest.fixture
def run(session: RaySession, tmp_path: Path) -> Any:
    def run(job: Any, num_workers: int = 2, **options: Any) -> JobResult:
        settings = {"storage_path": tmp_path, "name": "job", "launcher": "ray", **options}
        payload = {"directory": str(tmp_path), "number": 7}
        return run_on_workers(job, payload, num_workers=num_workers, session=session, **settings)

    return run


def test_rank_zero_answers_and_all_ranks_take_part(run: Any) -> None:
    def job(payload: dict[str, Any]) -> dict[str, Any]:
        import os

        import torch
        import torch.distributed as dist

        import moe_dist.moe  # noqa: F401  (found from any directory)

        total = torch.tensor([float(dist.get_rank() + payload["number"])])
        dist.all_reduce(total)
        return {
            "rank": dist.get_rank(),
            "sum": total.item(),
            "backend": dist.get_backend(),
            "threads": torch.get_num_threads(),
            "omp": os.environ["OMP_NUM_THREADS"],
        }

    polled: list[float] = []
    result = run(job, on_poll=lambda: polled.append(time.monotonic()))
    expected = {"rank": 0, "sum": 15.0, "backend": "gloo", "threads": 1, "omp": "1"}
    assert result.value == expected and result.num_attempts == 1
    assert polled and result.start_up_s > 0


def test_killed_worker_resumes_from_its_checkpoint(run: Any, tmp_path: Path) -> None:
    def job(payload: dict[str, Any]) -> dict[str, Any]:
        import os
        import signal
        from pathlib import Path

        import torch.distributed as dist

        directory = Path(payload["directory"])
        checkpoint = directory / "checkpoint"
        first = int(checkpoint.read_text()) if checkpoint.exists() else 0
        for step in range(first + 1, 6):
            dist.barrier()
            if dist.get_rank() == 0:
                checkpoint.write_text(str(step))
                with (directory / "steps").open("a") as stream:
                    stream.write(f"{step} ")
            dist.barrier()
            if step == 3 and first == 0 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return {"first": first}

    result = run(job, max_failures=1)
    assert result.value == {"first": 3} and result.num_attempts == 2
    assert (tmp_path / "steps").read_text() == "1 2 3 4 5 "
    workers = [json.loads(line) for line in (tmp_path / "job" / WORKERS_NAME).open()]
    assert [(w["attempt"], w["rank"]) for w in workers] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({w["pid"] for w in workers}) == 4
    assert {w["host"] for w in workers} == {socket.gethostname()}
    (restart,) = result.restarts
    assert restart.attempt == 1
    assert f"rank 1 (host {socket.gethostname()}" in restart.reason
    assert f"pid {workers[1]['pid']})" in restart.reason
    assert list(restart.parts) == ["detect", "stop", "start"] and 0 < restart.seconds < 300


def test_stopped_worker_is_ended_and_named(run: Any, tmp_path: Path) -> None:
    def job(payload: dict[str, Any]) -> int:
        import os
        import signal
        from pathlib import Path

        import torch
        import torch.distributed as dist

        from moe_dist.distributed.position import TRAINING, begin_step, collective, enter_phase

        mark = Path(payload["directory"]) / "stopped-before"
        enter_phase(TRAINING)
        for step in range(1, 4):
            begin_step(step)
            if step == 2 and dist.get_rank() == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            total = torch.ones(1)
            with collective("sum of gradients"):
                dist.all_reduce(total)
        return int(total.item())

    result = run(job, max_failures=1, step_timeout_s=3.0)
    assert result.value == 2 and result.num_attempts == 2
    (restart,) = result.restarts
    workers = [json.loads(line) for line in (tmp_path / "job" / WORKERS_NAME).open()]
    assert f"pid {workers[1]['pid']}) does not answer" in restart.reason
    assert "; rank 0" in restart.reason
    assert "waited in sum of gradients (number 1) of training, step" in restart.reason
    assert 3.0 <= restart.parts["detect"] < 60


def test_error_of_the_job_comes_back_as_itself(run: Any, tmp_path: Path) -> None:
    def job(payload: dict[str, Any]) -> None:
        from pathlib import Path

        import torch.distributed as dist

        from moe_dist.errors import NonFiniteLossError

        with (Path(payload["directory"]) / f"calls-{dist.get_rank()}").open("a") as stream:
            stream.write("x")
        if dist.get_rank() == 1:
            raise NonFiniteLossError("the loss is NaN at step 5", remedy="Lower the rate.")
        dist.barrier()

    with pytest.raises(NonFiniteLossError, match="NaN at step 5") as caught:
        run(job, max_failures=3)
    assert caught.value.remedy == "Lower the rate."
    assert "ray" not in str(caught.value).lower()
    assert (tmp_path / "calls-1").read_text() == "x"  # it was not tried again


@pytest.mark.slow
def test_deaths_beyond_the_limit_are_one_error(run: Any) -> None:
    def job(payload: dict[str, Any]) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TrainingError, match=r"failed more than 0 times .*rank \d \(host") as caught:
        run(job, max_failures=0)
    assert "newest checkpoint" in caught.value.remedy
    assert len(str(caught.value)) < 1500


def test_fault_of_the_code_is_not_tried_again(run: Any) -> None:
    def job(payload: dict[str, Any]) -> None:
        payload["missing"]

    with pytest.raises(TrainingError, match="KeyError: 'missing'"):
        run(job, num_workers=1, max_failures=3)


def test_one_worker_runs_here_without_ray(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def job(payload: dict[str, Any]) -> int:
        return os.getpid()

    result = run_on_workers(job, {}, num_workers=1, storage_path=tmp_path, name="here")
    assert result.value == os.getpid() and result.num_attempts == 1


def test_error_of_a_job_that_runs_here(tmp_path: Path) -> None:
    def job(payload: dict[str, Any]) -> None:
        raise NonFiniteLossError("NaN") if payload["nan"] else OSError(28, "No space left")

    for nan, expected, text in ((True, NonFiniteLossError, "NaN"), (False, TrainingError, "full")):
        with pytest.raises(expected, match=text):
            run_on_workers(
                job,
                {"nan": nan},
                num_workers=1,
                storage_path=tmp_path,
                name="here",
                launcher="local",
            )


def test_local_launcher_takes_one_worker(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="num_workers=2"):
        run_on_workers(print, {}, num_workers=2, storage_path=tmp_path, name="x", launcher="local")


def test_a_ray_that_does_not_start_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="could not be started: The current node timed out"):
        RaySession().connect()


def test_sigterm_stays_with_the_program_that_handles_it(tmp_path: Path) -> None:
    # In a process of its own, since the signal ends it; Ray's native handler would print a trace.
    code = """
import os, signal
from moe_dist.workers.ray_session import ray_session
signal.signal(signal.SIGTERM, signal.default_int_handler)
with ray_session() as session:
    session.connect()
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped\n", "", 0)
