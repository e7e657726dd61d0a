"""Sweeps on real Ray Tune: warm actors, early stops, failures, a small real search."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.search.early_stopping import Ruling
from moe_dist.search.trials import Report
from moe_dist.search.tune import find_room, run_sweep
from moe_dist.workers.cluster_capacity import read_capacity
from moe_dist.workers.ray_session import RaySession
from pipelines.search.results import write_results
from pipelines.search.sweep import SweepResult, search_recipe
from tests.pipelines.conftest import tiny_bert, tiny_settings, write_recipe  # noqa: F401
from tests.pipelines.recorder import Recorder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


class Notes:
    """A watcher that remembers."""

    def __init__(self, tasks: list[dict[str, Any]], stop_after: int | None = None) -> None:
        self.tasks = tasks
        self.reports: dict[int, list[int]] = {}
        self.pids: set[int] = set()
        self.ends: dict[int, str] = {}
        self._stop_after = stop_after

    def next_task(self) -> dict[str, Any] | None:
        return self.tasks.pop(0) if self.tasks else None

    def started(self, number: int) -> None:
        self.reports[number] = []

    def reported(self, number: int, report: Report, num_steps: int, seconds: float) -> None:
        self.reports[number].append(report.rung)
        self.pids.add(int(report.metrics["pid"]))
        assert seconds >= 0

    def ended(self, number: int, message: str = "") -> None:
        self.ends[number] = message

    def is_time_up(self) -> bool:
        return self._stop_after is not None and len(self.ends) >= self._stop_after


def climb(task: dict[str, Any], say: Callable[[Any], None]) -> None:
    """Report the task's own quality at each of three rungs; or fail, or die."""
    for rung in (1, 3, 9):
        if task.get("fails"):
            raise ValueError("the point is bad")
        if task.get("dies"):
            os._exit(1)
        metrics = {"quality": task["quality"], "pid": float(os.getpid())}
        say({"rung": rung, "step": 10 * rung, "num_steps": 90, "metrics": metrics})


def sweep(session: RaySession, notes: Notes, scheduler: str = "asha") -> None:
    room = find_room(read_capacity(), 1, 1, use_gpu=False, most=1)
    ruling = Ruling(scheduler, "quality", "max", last_rung=9, reduction_factor=3)
    # A nested function is sent by value: workers know nothing of the tests.
    run_sweep(
        lambda task, say: climb(task, say),
        notes,
        ruling,
        room,
        session,
        num_trials=len(notes.tasks),
    )


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_asha_ends_bad_trials_at_once_in_one_warm_actor(session: RaySession) -> None:
    qualities = [0.9, 0.1, 0.2, 0.95, 0.3]
    notes = Notes([{"number": n, "quality": q} for n, q in enumerate(qualities, start=1)])
    sweep(session, notes)
    assert notes.ends == dict.fromkeys(range(1, 6), "")
    assert notes.reports == {1: [1, 3, 9], 2: [1], 3: [1], 4: [1, 3, 9], 5: [1]}
    assert len(notes.pids) == 1


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_trial_that_is_not_ruled_goes_to_its_end(session: RaySession, scheduler: str) -> None:
    free = {"number": 0, "quality": 0.1, "is_ruled": False}
    notes = Notes([{"number": 1, "quality": 0.9}, free, {"number": 2, "quality": 0.95}])
    sweep(session, notes, scheduler)
    assert notes.reports[0] == notes.reports[2] == [1, 3, 9]


def test_failed_and_dead_trials_say_so_and_the_others_go_on(session: RaySession) -> None:
    notes = Notes(
        [
            {"number": 1, "fails": True},
            {"number": 2, "dies": True},
            {"number": 3, "quality": 0.5},
        ]
    )
    sweep(session, notes, "none")
    assert notes.ends[1].endswith("ValueError: the point is bad")
    assert notes.ends[2].startswith("its worker ended")
    assert notes.ends[3] == "" and notes.reports[3] == [1, 3, 9]


def test_a_sweep_whose_time_is_up_ends(session: RaySession) -> None:
    notes = Notes([{"number": n, "quality": 0.5} for n in range(1, 6)], stop_after=2)
    sweep(session, notes, "none")
    assert 2 <= len(notes.ends) < 5


def test_a_small_search_on_ray_tune(
    session: RaySession,
    write_recipe: Callable[[dict[str, Any]], Path],  # noqa: F811
    tiny_settings: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    tiny_settings["train"] |= {"num_epochs": 2}
    tiny_settings["parallel"] = {}
    tiny_settings["tracking"] = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    space = {"moe.router": {"from": "routers"}, "distill.kl_weight": {"uniform": [0, 2]}}
    tiny_settings["search"] = {"num_trials": 4, "space": space}
    config = load_config(write_recipe(tiny_settings))

    def finish(result: SweepResult, run: Any) -> int | None:
        summary = write_results(result, run)
        assert summary["best"] is not None
        return int(summary["best"]["trial"])

    result = search_recipe(config, Recorder(), finish)
    assert {trial.status for trial in result.trials.values()} <= {"finished", "stopped"}
    assert len(result.trials) == 5 and result.trials[0].status == "finished"
    report = json.loads((tmp_path / "outputs/tiny/search/report.json").read_text())
    check_runs(tmp_path, report["best"]["trial"])


def check_runs(directory: Path, best: int) -> None:
    """The sweep is one run; its teacher and trials are children; one is marked as the best."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{directory}/mlflow.db")
    experiment = client.get_experiment_by_name("moe-dist")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_name == "tiny search"
    below: dict[str, list[Any]] = {}
    for run in runs:
        below.setdefault(run.data.tags.get("mlflow.parentRunId", ""), []).append(run)
    children = below[parent.info.run_id]
    trials = {int(run.data.tags["trial"]): run for run in children if "trial" in run.data.tags}
    assert set(trials) == {0, 1, 2, 3, 4} and len(children) == 7
    marked = [number for number, run in trials.items() if run.data.tags["best"] == "true"]
    assert marked == [best]
    for run in trials.values():
        assert run.info.status == "FINISHED"
        choices = {"router", "partition", "num_shared_neurons", "seed"}
        assert choices | {"recipe_hash", "cluster"} <= set(run.data.tags)
        assert client.get_metric_history(run.info.run_id, "trial/quality")
        stages = {stage.info.run_name: stage for stage in below[run.info.run_id]}
        assert set(stages) == {"adapt", "evaluate", "distill"}
        assert {stage.info.status for stage in stages.values()} == {"FINISHED"}
        began = [stages[name].info.start_time for name in ("adapt", "evaluate", "distill")]
        assert began == sorted(began) and stages["distill"].info.end_time >= began[-1]
        assert client.get_metric_history(stages["distill"].info.run_id, "dev/accuracy")
        assert client.get_metric_history(stages["evaluate"].info.run_id, "student/flops")
    assert "best/quality" in parent.data.metrics
