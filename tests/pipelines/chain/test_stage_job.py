"""Where a stage's job runs, and what is shown of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from moe_dist.config import load_config
from moe_dist.distributed.peers import Roster, own_peer
from moe_dist.distributed.position import FIRST_STEP, LOAD_CHECKPOINT, TRAINING
from moe_dist.distributed.stall import Stall
from moe_dist.jobs.distill import DistillJob
from moe_dist.metric_log import MetricLog
from moe_dist.workers.attempts import PhaseNotes, note_attempt, note_fault
from moe_dist.workers.worker_cpus import worker_cpus
from pipelines.chain import stage_job
from pipelines.chain.stage import StageWork
from pipelines.chain.stage_job import (
    placed_here,
    run_job,
    run_training,
    show_failures,
    show_progress,
)
from pipelines.chain.workspace import Workspace
from pipelines.console import Console

Write = Callable[[dict[str, Any]], Path]


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four CPUs, no GPU, no cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for module in ("ray_session", "worker_cpus"):
        monkeypatch.setattr(f"moe_dist.workers.{module}.available_cpus", lambda: 4)


def placement(write_recipe: Write, settings: dict[str, Any], **parallel: Any) -> tuple[Any, ...]:
    config = load_config(write_recipe(settings | {"parallel": parallel}))
    placed = placed_here(config).parallel
    return placed.launcher, placed.num_workers


@pytest.mark.parametrize(("cpus_per_worker", "num_threads"), [(1, 3), (2, 4), ("auto", 4)])
def test_a_short_job_takes_the_threads_of_all_workers(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    cpus_per_worker: int | str,
    num_threads: int,
) -> None:
    parallel = {"num_workers": 3, "cpus_per_worker": cpus_per_worker}
    config = load_config(write_recipe(tiny_settings | {"parallel": parallel}))
    placed = placed_here(config).parallel
    assert (placed.launcher, placed.num_workers) == ("local", 1)
    assert worker_cpus(placed) == num_threads


@pytest.mark.parametrize(
    ("parallel", "alone", "workers", "cpus"),
    [
        ({}, False, 1, 4),
        ({"num_workers": 2}, False, 2, 2),
        ({"num_workers": 2, "launcher": "ray"}, True, 1, 4),
        ({"num_workers": 2, "cpus_per_worker": 3}, False, 2, 3),
    ],
)
def test_workers_are_given_a_number_of_cpus(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parallel: dict[str, Any],
    alone: bool,
    workers: int,
    cpus: int,
) -> None:
    run_on_workers = Mock()
    run_on_workers.return_value.restarts, run_on_workers.return_value.world_sizes = (), (1,)
    monkeypatch.setattr("moe_dist.workers.driver.run_on_workers", run_on_workers)
    config = load_config(write_recipe(tiny_settings | {"parallel": parallel}))
    work = StageWork(tmp_path, Console(quiet=True), Mock(), resumed=False)
    workspace = Workspace(config, Console(quiet=True))
    run_job(Mock(), config=config, work=work, workspace=workspace, alone=alone)
    given = run_on_workers.call_args.kwargs
    assert (given["num_workers"], given["cpus_per_worker"]) == (workers, cpus)


def test_workers_stay_on_a_cluster_on_gpus_and_where_ray_is_asked_for(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert placement(write_recipe, tiny_settings, num_workers=2, launcher="ray") == ("ray", 2)
    assert placement(write_recipe, tiny_settings, num_workers=2, use_gpu=True) == ("auto", 2)
    with monkeypatch.context() as patched:
        patched.setenv("RAY_ADDRESS", "auto")
        assert placement(write_recipe, tiny_settings, num_workers=2) == ("auto", 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert placement(write_recipe, tiny_settings, num_workers=2) == ("auto", 2)
    assert placement(write_recipe, tiny_settings, num_workers=2, use_gpu=False)[0] == "local"


@pytest.mark.parametrize(("num_epochs", "placed", "num_steps"), [(0, 1, None), (2, 3, 14)])
def test_a_model_that_is_kept_needs_no_workers_and_takes_no_steps(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_epochs: int,
    placed: int,
    num_steps: int | None,
) -> None:
    asked: dict[str, Any] = {}
    found = {"metrics": {"accuracy": 0.5}, "num_steps": 14, "resumed_from": None}

    def run_job(job: Any, **options: Any) -> dict[str, Any]:
        asked.update(options)
        return found | {"peak_memory_gib": 0.5, "expert_load": {"0": [0.5, 0.5]}}

    monkeypatch.setattr(stage_job, "run_job", run_job)
    sections = {name: {"num_epochs": num_epochs} for name in ("finetune", "train")}
    settings = tiny_settings | sections | {"parallel": {"num_workers": 3}}
    config = load_config(write_recipe(settings))
    workspace = Mock()
    workspace.num_steps.side_effect = lambda train, rows: 7 * train.num_epochs
    job = DistillJob.of(config, str(tmp_path), student="", teacher="")
    MetricLog(tmp_path / "metrics.jsonl").append(1, {"train/loss/total": 0.5})
    work = StageWork(tmp_path, Console(quiet=True), Mock(), resumed=False)
    outcome = run_training(job, config=config, work=work, workspace=workspace, title="distill")
    assert asked["config"].parallel.num_workers == placed
    assert asked["num_steps"] == num_steps
    assert workspace.num_steps.call_args_list == (
        [call(job.train, "distilled")] if num_steps else []
    )
    assert outcome.outputs == {"model": tmp_path / "model"}
    assert outcome.metrics == found["metrics"]
    assert outcome.details == {"num_steps": 14, "resumed_from": None, "peak_memory_gib": 0.5}
    pictures = ["losses.png", "expert-load.png"] if num_steps else []
    assert [path.name for path in outcome.plots] == pictures


def test_progress_shows_loss_speed_and_the_last_dev_metric(tmp_path: Path) -> None:
    shown: list[tuple[int, dict[str, float]]] = []

    class Recorder(Console):
        def progress(
            self, step: int, total: int | None, figures: Any = None, terms: Any = None
        ) -> None:
            shown.append((step, dict(figures)))

    log = MetricLog(tmp_path / "metrics.jsonl")
    on_poll = show_progress(log.path, Recorder(quiet=True), 20)
    on_poll()
    log.append(10, {"train/loss/total": 0.5, "perf/tokens_per_s": 4000.0, "train/epoch": 1.0})
    log.append(10, {"dev/accuracy": 0.75, "dev/f1": 0.5, "moe/expert_load/0/0": 0.5})
    on_poll()
    log.append(20, {"train/loss/total": 0.25, "perf/tokens_per_s": 5000.0})
    on_poll()
    assert shown == [
        (10, {"loss": 0.5, "tokens/s": 4000.0, "dev accuracy": 0.75}),
        (20, {"loss": 0.25, "tokens/s": 5000.0, "dev accuracy": 0.75}),
    ]


def test_old_lines_of_a_continued_log_are_one_position(tmp_path: Path) -> None:
    shown: list[int] = []

    class Recorder(Console):
        def progress(
            self, step: int, total: int | None, figures: Any = None, terms: Any = None
        ) -> None:
            shown.append(step)

    log = MetricLog(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append(step, {"train/loss/total": 0.5})
    on_poll = show_progress(log.path, Recorder(quiet=True), 50)
    on_poll()
    log.truncate_after(20)
    log.append(30, {"train/loss/total": 0.25})
    log.append(40, {"train/loss/total": 0.25})
    on_poll()
    assert shown == [30, 40]


def test_failures_are_told_once(tmp_path: Path) -> None:
    told: list[str] = []

    class Recorder(Console):
        def warn(self, message: str) -> None:
            told.append(message)

        def note(self, message: str) -> None:
            told.append(message)

    on_poll = show_failures(tmp_path, Recorder())
    note_attempt(tmp_path, Roster(1, "", (own_peer(),)))
    on_poll()
    assert told == []
    note_fault(tmp_path, 1, Stall("rank 1 is gone", 1.0))
    on_poll()
    on_poll()
    assert told == ["workers failed: rank 1 is gone"]
    note_attempt(tmp_path, Roster(2, "", (own_peer(),)))
    for phase in (LOAD_CHECKPOINT, FIRST_STEP, TRAINING):
        PhaseNotes(tmp_path, 2)(phase)
        on_poll()
    on_poll()
    assert len(told) == 2 and told[1].startswith("workers run again after ")
