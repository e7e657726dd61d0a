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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ClusterError, NonFiniteLossError, TrainingError
from moe_dist.workers.attempts import WORKERS_NAME
from moe_dist.workers.driver import JobResult, run_on_workers
from moe_dist.workers.ray_session import RaySession, ray_session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
STEP_TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    pytest.importorskip("ray")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPUs")
    with ray_session(preload=("moe_dist.distributed",)) as session:
        yield session


@pytest.fixture
def run(session: RaySession, tmp_path: Path) -> Any:
    return runner(session, tmp_path)


def runner(session: RaySession, directory: Path) -> Any:
    def run(job: Any, num_workers: int = 2, **options: Any) -> JobResult:
        settings = {"storage_path": directory, "name": "job", "launcher": "ray", **options}
        payload = {"directory": str(directory), "number": 7}
        return run_on_workers(job, payload, num_workers=num_workers, session=session, **settings)

    return run


@dataclass(frozen=True)
class Survivor:
    """A job whose rank 1 was killed after step 3 and stopped in step 5, and what it left."""

    result: JobResult
    directory: Path
    workers: list[dict[str, Any]]
    num_polls: int


@pytest.fixture(scope="module")
def survivor(session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Survivor:
    """One job for all that a job survives: workers take long to start."""

    def job(payload: dict[str, Any]) -> dict[str, Any]:
        import os
        import signal
        import sys
        from pathlib import Path

        import psutil
        import torch
        import torch.distributed as dist

        import moe_dist.moe  # noqa: F401  (found from any directory)
        from moe_dist.distributed.position import TRAINING, begin_step, collective, enter_phase

        directory = Path(payload["directory"])
        checkpoint = directory / "checkpoint"
        first = int(checkpoint.read_text()) if checkpoint.exists() else 0
        enter_phase(TRAINING)
        for step in range(first + 1, 6):
            begin_step(step)
            if step == 5 and first == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            total = torch.tensor([float(dist.get_rank() + payload["number"])])
            with collective("sum of gradients"):
                dist.all_reduce(total)
            if dist.get_rank() == 0:
                checkpoint.write_text(str(step))
                with (directory / "steps").open("a") as stream:
                    stream.write(f"{step} ")
            dist.barrier()
            if step == 3 and first == 0 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return {
            "first": first,
            "rank": dist.get_rank(),
            "sum": total.item(),
            "backend": dist.get_backend(),
            "threads": torch.get_num_threads(),
            "omp": os.environ["OMP_NUM_THREADS"],
            "parent": psutil.Process(os.getppid()).cmdline()[2:4],
            "unused": sorted(
                {"matplotlib", "mlflow", "sklearn", "tensorboardX"} & set(sys.modules)
            ),
        }

    directory = tmp_path_factory.mktemp("survivor")
    polled: list[float] = []
    run = runner(session, directory)
    result = run(
        job,
        max_failures=2,
        step_timeout_s=STEP_TIMEOUT_S,
        on_poll=lambda: polled.append(time.monotonic()),
    )
    workers = [json.loads(line) for line in (directory / "job" / WORKERS_NAME).open()]
    return Survivor(result, directory, workers, len(polled))


def test_rank_zero_answers_and_all_ranks_take_part(survivor: Survivor) -> None:
    facts = {"rank": 0, "sum": 15.0, "backend": "gloo", "threads": 1, "omp": "1"}
    # Every attempt's workers come from one process, which has imported what they need.
    origin = {"parent": ["-m", "moe_dist.workers.fork_server"], "unused": []}
    assert survivor.result.value == facts | origin | {"first": 4}
    assert survivor.num_polls and survivor.result.start_up_s > 0


def test_every_start_has_workers_of_its_own_and_goes_on_from_the_checkpoint(
    survivor: Survivor,
) -> None:
    assert (survivor.directory / "steps").read_text() == "1 2 3 4 5 "
    assert survivor.result.num_attempts == 3
    found = [(worker["attempt"], worker["rank"]) for worker in survivor.workers]
    assert found == [(attempt, rank) for attempt in (1, 2, 3) for rank in (0, 1)]
    assert len({worker["pid"] for worker in survivor.workers}) == 6
    assert {worker["host"] for worker in survivor.workers} == {socket.gethostname()}
    assert [restart.attempt for restart in survivor.result.restarts] == [1, 2]


def test_a_killed_worker_is_named(survivor: Survivor) -> None:
    killed, _ = survivor.result.restarts
    assert f"rank 1 (host {socket.gethostname()}" in killed.reason
    assert f"pid {survivor.workers[1]['pid']})" in killed.reason
    assert list(killed.parts) == ["detect", "stop", "start"] and 0 < killed.seconds < 300


def test_a_stopped_worker_is_ended_and_named(survivor: Survivor) -> None:
    _, stopped = survivor.result.restarts
    assert f"pid {survivor.workers[3]['pid']}) does not answer" in stopped.reason
    assert "; rank 0" in stopped.reason
    assert "waited in sum of gradients (number 1) of training, step 5" in stopped.reason
    assert STEP_TIMEOUT_S <= stopped.parts["detect"] < 60


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
        import numpy  # noqa: F401
        from threadpoolctl import threadpool_info

        blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        payload["missing", f"NumPy has {blas} threads"]

    # A worker's NumPy has as many threads as the worker has CPUs, though the process that it was
    # forked from has one.
    with pytest.raises(TrainingError, match=r"KeyError: \('missing', 'NumPy has \{2\} threads'\)"):
        run(job, num_workers=1, cpus_per_worker=2, max_failures=3)


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
