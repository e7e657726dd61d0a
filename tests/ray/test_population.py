"""Population based training on real Ray Tune: weak trials go on from strong ones' weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.metric_log import MetricLog
from moe_dist.search.early_stopping import Ruling
from moe_dist.search.population import Population
from moe_dist.search.trials import TrialLog
from moe_dist.search.tune import find_room, run_sweep
from moe_dist.workers.cluster_capacity import read_capacity
from moe_dist.workers.ray_session import RaySession
from pipelines.search import sweep as sweeping
from pipelines.search.results import write_results
from pipelines.search.sweep import SweepResult, search_recipe
from tests.pipelines.conftest import tiny_bert, tiny_settings, write_recipe  # noqa: F401
from tests.pipelines.recorder import Recorder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Notes:
    """A watcher that remembers, and lets the weak have what the strong have, less one tenth."""

    def __init__(self, tasks: list[dict[str, Any]]) -> None:
        self._tasks = {task["number"]: task for task in tasks}
        self._waiting = list(tasks)
        self.reports: dict[int, list[tuple[int, float]]] = {}
        self.ends: dict[int, str] = {}
        self.bred: list[tuple[int, int, int]] = []

    def next_task(self) -> dict[str, Any] | None:
        return self._waiting.pop(0) if self._waiting else None

    def started(self, number: int) -> None:
        self.reports[number] = []

    def reported(self, number: int, report: Any, num_steps: int, seconds: float) -> None:
        self.reports[number].append((report.rung, report.metrics["quality"]))

    def ended(self, number: int, message: str = "") -> None:
        self.ends[number] = message

    def is_time_up(self) -> bool:
        return False

    def breed(self, weak: int, strong: int, step: int) -> dict[str, Any]:
        self.bred.append((weak, strong, step))
        speed = self._tasks[strong]["speed"] * 0.9
        self._tasks[weak] = {**self._tasks[weak], "speed": speed}
        return self._tasks[weak]


def climb(task: Mapping[str, Any], say: Callable[[Any], None]) -> None:
    """Rise by the task's own speed from rung to rung; what is reached is the checkpoint."""
    begin, reached = json.loads(task["resume"]) if task.get("resume") else (0, 0.0)
    for rung in range(begin + 1, 4):
        if task.get("fails") and rung == 2:
            raise ValueError("the point is bad")
        if task.get("dies") and rung == 2:
            os._exit(1)
        reached += task["speed"]
        report = {"rung": rung, "step": 10 * rung, "num_steps": 30, "metrics": {"quality": reached}}
        if rung < 3 and task.get("is_ruled", True):
            report["checkpoint"] = json.dumps([rung, reached])
        say(report)


def sweep(session: RaySession, notes: Notes, directory: Path) -> None:
    room = find_room(read_capacity(), 1, 1, use_gpu=False)
    run_sweep(
        lambda task, say: climb(task, say),
        notes,
        Ruling("pbt", "quality", "max", last_rung=3, reduction_factor=3),
        room,
        session,
        num_trials=5,
        population=Population(notes.breed, directory, seed=0),
    )


@pytest.mark.parametrize("how", ["fails", pytest.param("dies", marks=pytest.mark.slow)])
def test_the_weakest_goes_on_from_the_strongest_and_nobody_waits_for_the_dead(
    session: RaySession, tmp_path: Path, how: str
) -> None:
    notes = Notes(
        [
            *({"number": n, "speed": float(n)} for n in (1, 2, 3)),
            {"number": 0, "speed": 0.5, "is_ruled": False},
            # The last that the others would wait for at the second rung.
            {"number": 4, "speed": 2.5, how: True},
        ]
    )
    sweep(session, notes, tmp_path)
    # 1 follows 3 with speed 2.7; at the second rung it has 5.7, 3 has 6, and 2 is the last.
    assert notes.bred == [(1, 3, 10), (2, 3, 20)]
    assert notes.reports == {
        0: [(1, 0.5), (2, 1.0), (3, 1.5)],
        1: [(1, 1.0), (2, 3 + 2.7), (3, 3 + 2.7 + 2.7)],
        2: [(1, 2.0), (2, 4.0), (3, 6 + 2.7)],
        3: [(1, 3.0), (2, 6.0), (3, 9.0)],
        4: [(1, 2.5)],
    }
    assert notes.ends.pop(4) and notes.ends == dict.fromkeys(range(4), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trial_goes_on_from_the_weights_of_another(
    session: RaySession,
    write_recipe: Callable[[dict[str, Any]], Path],  # noqa: F811
    tiny_settings: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_settings["train"] |= {"num_epochs": 2, "log_every": 1, "lr_schedule": "constant"}
    tiny_settings["parallel"] = {}
    tiny_settings["search"] = {
        "scheduler": "pbt",
        "num_trials": 4,
        "rungs": 2,
        "baseline": False,
        "space": {
            "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "moe.router": {"choice": ["token_gate", "hash_random"]},
        },
    }
    config = load_config(write_recipe(tiny_settings))
    monkeypatch.setattr(sweeping, "remove_weights", lambda trials: None)

    def finish(result: SweepResult, run: Any) -> int | None:
        return int(write_results(result, run)["best"]["trial"])

    result = search_recipe(config, Recorder(), finish)
    assert {trial.status for trial in result.trials.values()} == {"finished"}
    directory = tmp_path / "outputs/tiny/search"
    led = [trial for trial in result.trials.values() if len(trial.weight_history) > 1]
    assert led and TrialLog(directory / "trials.jsonl").trials == result.trials
    for trial in led:
        before, last = trial.weight_history[-2:]
        assert last.trial == trial.number and before.trial != trial.number
        assert last.overrides["moe.router"] == before.overrides["moe.router"]
        own, other = (
            directory / f"trials/trial-{n:04d}/distill" for n in (trial.number, before.trial)
        )
        name = f"checkpoints/step-{last.step:08d}"
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (own / name / file).read_bytes() == (other / name / file).read_bytes()
        summary = json.loads((own / "result.json").read_text())
        assert summary["resumed_from"] == last.step and summary["num_steps"] == trial.num_steps
        rates = {
            record.step: record.metrics["train/learning_rate"]
            for record in MetricLog(own / "metrics.jsonl").read()
            if "train/learning_rate" in record.metrics
        }
        assert rates[last.step + 1] == pytest.approx(last.overrides["train.learning_rate"])
        assert rates[trial.num_steps] == pytest.approx(last.overrides["train.learning_rate"])
