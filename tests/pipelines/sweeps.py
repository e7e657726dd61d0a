"""Sweeps of a tiny recipe whose trials run in this process, without Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import pytest

from moe_dist.search.trials import Report, Trial
from moe_dist.search.tune import TrialRoom
from moe_dist.workers.placement import Placement, WorkerNeed
from pipelines.search import sweep as sweeping
from pipelines.search.results import write_results
from pipelines.search.sweep import SweepResult

SPACE = {
    "moe.router": {"from": "routers"},
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
}


class Ended(BaseException):
    """A trial that is stopped where it reports, as Tune does it."""


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run trials one after the other; the last measured stands for an early stop of odd ones."""

    def run_sweep(
        run_trial: Any,
        watcher: Any,
        ruling: Any,
        room: Any,
        session: Any,
        *,
        num_trials: int,
        past: Iterable[Trial] = (),
    ) -> None:
        while (task := watcher.next_task()) is not None and not watcher.is_time_up():
            number = task["number"]
            watcher.started(number)
            begin = time.monotonic()

            def say(report: Any, number: int = number, begin: float = begin) -> None:
                told = Report(report["rung"], report["step"], dict(report["metrics"]))
                watcher.reported(number, told, report["num_steps"], time.monotonic() - begin)
                if number % 2 and report["rung"] < ruling.last_rung:
                    raise Ended

            try:
                run_trial(json.loads(json.dumps(task)), say)
            except Ended:
                watcher.ended(number)
            except Exception as fault:
                watcher.ended(number, str(fault))
            else:
                watcher.ended(number)

    room = TrialRoom(Placement(1, 1, WorkerNeed(1)), 1, in_place=True)
    monkeypatch.setattr(sweeping, "run_sweep", run_sweep)
    monkeypatch.setattr(sweeping, "_find_room", lambda *_: room)


@pytest.fixture
def settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with a search of three trials over router and learning rate."""
    tiny_settings["train"] |= {"num_epochs": 2}
    tiny_settings["search"] = {"num_trials": 3, "space": SPACE, "algorithm": "random"}
    return tiny_settings


def finish(result: SweepResult, run: Any) -> int | None:
    """Write a sweep's results, and tell the number of its best trial."""
    summary = write_results(result, run)
    return None if summary["best"] is None else summary["best"]["trial"]
