"""A population without Ray: whose weights a trial goes on with, its records, and its report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.errors import MoeDistError
from moe_dist.jobs.results import load_predictions
from moe_dist.search.trials import Report, TrialLog
from moe_dist.search.tune import TrialRoom
from moe_dist.workers.placement import Placement, WorkerNeed
from pipelines.search import sweep as sweeping
from pipelines.search.results import write_results
from pipelines.search.rungs import rung_times
from pipelines.search.sweep import SweepResult, search_recipe
from pipelines.search.trial import TrialRunner, training_directory
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]
Sweep = Callable[..., None]


class Paused(BaseException):
    """A trial that is stopped where it reports, as Tune does it."""


def in_rounds(
    run_trial: Any,
    watcher: Any,
    ruling: Any,
    room: Any,
    session: Any,
    *,
    num_trials: int,
    population: Any,
) -> None:
    """Train all to each rung in turn; trial 1 then follows trial 2, whatever they reached."""
    tasks = {task["number"]: task for task in iter(watcher.next_task, None)}
    assert ruling.scheduler == "pbt" and len(tasks) == num_trials
    step = 0

    def say(report: Any, number: int, rung: int) -> None:
        nonlocal step
        told = Report(report["rung"], report["step"], dict(report["metrics"]))
        watcher.reported(number, told, report["num_steps"], float(rung))
        assert ("checkpoint" in report) is (number > 0 and report["rung"] < ruling.last_rung)
        if "checkpoint" in report:
            assert report["rung"] == rung and Path(report["checkpoint"]).is_dir()
            tasks[number]["resume"] = report["checkpoint"]
            step = report["step"]
            raise Paused

    for rung in range(1, ruling.last_rung + 1):
        for number in list(tasks):
            if rung == 1:
                watcher.started(number)
            try:
                run_trial(
                    json.loads(json.dumps(tasks[number])),
                    lambda report, number=number, rung=rung: say(report, number, rung),
                )
            except Paused:
                continue
            watcher.ended(number)
            del tasks[number]
        if rung < ruling.last_rung:
            resume = tasks[2]["resume"]
            tasks[1] = {**population.breed(1, 2, step), "resume": resume}


@pytest.fixture
def settings(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    room = TrialRoom(Placement(1, 1, WorkerNeed(1)), 1, in_place=True)
    monkeypatch.setattr(sweeping, "run_sweep", in_rounds)
    monkeypatch.setattr(sweeping, "_find_room", lambda *_: room)
    space = {
        "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "moe.router": {"choice": ["hash_random", "token_gate"]},
    }
    tiny_settings["train"] |= {"num_epochs": 2}
    tiny_settings["search"] = {"scheduler": "pbt", "num_trials": 2, "space": space}
    return tiny_settings


def finish(result: SweepResult, run: Any) -> int | None:
    return int(write_results(result, run)["best"]["trial"])


def test_a_population_is_recorded_and_reported(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    from pyarrow import parquet

    config = load_config(write_recipe(settings))
    recorder = Recorder()
    result = search_recipe(config, recorder, finish)
    directory = tmp_path / "outputs/tiny/search"
    assert [trial.status for trial in result.trials.values()] == ["finished"] * 3
    follower, strong = result.trials[1], result.trials[2]
    first, last = follower.weight_history
    assert (first.step, first.trial, last.step, last.trial) == (0, 2, 8, 1)
    assert follower.num_steps == 12 and len(strong.weight_history) == 1
    assert {segment.overrides["moe.router"] for segment in follower.weight_history} == {
        strong.overrides["moe.router"]
    }
    assert follower.overrides == last.overrides
    assert last.overrides["train.learning_rate"] != first.overrides["train.learning_rate"]
    assert TrialLog(directory / "trials.jsonl").trials == result.trials
    assert not list(directory.glob("trials/*/distill/checkpoints"))
    table = parquet.read_table(directory / "trials.parquet").to_pydict()
    assert table["weight_history"][1].startswith("2, from step ")

    text = (directory / "report.md").read_text()
    best = load_config(directory / "best.yaml")
    summary = json.loads((directory / "report.json").read_text())
    chosen = result.trials[summary["best"]["trial"]]
    expected = chosen.overrides.get("train.learning_rate", config.train.learning_rate)
    assert best.train.learning_rate == expected and "| weights |" in text
    assert summary["importance"] == {}

    # A finished population is reported again; one that lost its end is refused.
    again = search_recipe(config, recorder, finish)
    assert again.trials == result.trials
    log = directory / "trials.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [line for line in lines if line["event"] != "ended"]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    with pytest.raises(MoeDistError, match="cannot go on without each other") as refused:
        search_recipe(config, recorder, finish)
    assert "--set name=NAME" in (refused.value.remedy or "")


def test_a_trial_goes_on_as_the_one_that_it_follows_would(
    write_recipe: Write,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(write_recipe(settings))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sweeping, "run_sweep", stop)
        with pytest.raises(KeyboardInterrupt, match="start it anew with another `name`"):
            search_recipe(config, Recorder(), finish)
    result = search_recipe(config, Recorder(), finish)
    times = rung_times(config.search)
    place = tmp_path / "again"
    runner = TrialRunner(result.config, str(place), times, result.teachers)
    (teacher,) = result.teachers
    strong = {"train.learning_rate": 3e-3, "moe.router": "token_gate"}
    weak = {"train.learning_rate": 1e-4, "moe.router": "hash_random"}

    def run(number: int, overrides: dict[str, Any], **options: Any) -> str:
        """Run to the next rung, or the end; gives the checkpoint."""
        task = {"number": number, "overrides": overrides, "teacher": teacher, "in_place": True}
        place: list[str] = []

        def say(report: Any) -> None:
            if "checkpoint" in report:
                place.append(report["checkpoint"])
                raise Paused

        try:
            runner({**task, "is_ruled": True, **options}, say)
        except Paused:
            return place[0]
        return ""

    def answers(number: int) -> list[list[float]]:
        path = training_directory(place, number) / "predictions.npz"
        return load_predictions(path).logits.tolist()

    run(1, strong, is_ruled=False)
    at_first = run(2, strong)
    run(3, weak)
    at_second = run(3, strong, resume=at_first)
    assert run(3, strong, resume=at_second) == ""
    # Through two checkpoints, and from another trial's directory: as if it had never stopped.
    assert answers(3) == answers(1)
    moved = strong | {"train.learning_rate": 1e-3}
    run(4, moved, resume=run(4, moved, resume=at_first))
    assert answers(4) != answers(1)
    shutil.rmtree(place)
