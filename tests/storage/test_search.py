"""A sweep whose results lie in a bucket, on machines that share nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.errors import MoeDistError
from moe_dist.jobs.results import load_predictions
from moe_dist.search.trials import TrialLog
from moe_dist.storage import Store, local_file
from moe_dist.tracking import RunReader
from pipelines.chain.chain import run_chain
from pipelines.search import confirming
from pipelines.search import sweep as sweeping
from pipelines.search.sweep import SweepResult, search_recipe
from pipelines.search.trial import TrialRunner
from tests.pipelines.recorder import Recorder
from tests.pipelines.sweeps import finish, in_this_process, settings
from tests.storage.test_chain import SECRET, machines

__all__ = ["in_this_process", "machines", "settings"]
Write = Callable[[dict[str, Any]], Path]


def without_report(result: SweepResult, run: Any) -> None:
    """Leave the sweep without pictures, which take their time."""


@pytest.fixture
def place(s3: str, settings: dict[str, Any]) -> Store:
    """Where the sweep of `settings` lies."""
    settings["output_dir"] = f"{s3}/out"
    settings["train"]["num_epochs"] = 1
    settings["search"] |= {"num_trials": 2, "scheduler": "none", "rungs": 1}
    return Store(f"{s3}/out/tiny/search")


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_sweep_in_a_bucket_goes_on_elsewhere(
    place: Store,
    write_recipe: Write,
    settings: dict[str, Any],
    machines: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(confirming, "run_sweep", sweeping.run_sweep)
    settings["tracking"] = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    settings["data"]["holdout_samples"] = 12
    # One expert is cheaper, whatever it has learned, so the first trial is the best.
    settings["search"] |= {"metric": "parameters", "confirm_seeds": 2, "algorithm": "grid"}
    settings["search"]["space"] = {"moe.num_experts": {"choice": [1, 3]}}
    config = load_config(write_recipe(settings))
    ran: list[int] = []
    whole = TrialRunner.__call__

    def stop_at_two(self: TrialRunner, task: Any, say: Any) -> None:
        whole(self, task, say)
        ran.append(task["number"])
        if task["number"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrialRunner, "__call__", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            search_recipe(config, Recorder(), finish)
    with local_file(f"{place.uri}/trials.jsonl") as path:
        statuses = {number: one.status for number, one in TrialLog(path).trials.items()}
    assert statuses == {0: "finished", 1: "finished", 2: "running"}

    def note(self: TrialRunner, task: Any, say: Any) -> None:
        ran.append(task["number"])
        whole(self, task, say)

    monkeypatch.setattr(TrialRunner, "__call__", note)
    scratch = machines()
    recorder = Recorder()
    result = search_recipe(config, recorder, finish)
    assert recorder.ran == [] and len(recorder.skipped) == 2
    assert ran == [0, 1, 2, 2, 0, 1, 2, 3]
    assert result.files.shown(result.directory / "best.yaml") == f"{place.uri}/best.yaml"
    # Nothing bulky stays.
    assert not [*scratch.rglob("*.safetensors"), *scratch.rglob("*.npz")]

    report = json.loads(place.read("report.json") or b"")
    assert report["best"]["trial"] == 1 and report["against_baseline"] is not None
    assert report["confirmed"]["on_examples"]["num_examples"] == 16
    names = {entry.name for entry in place.list()}
    assert {"best.yaml", "report.md", "trials.parquet", "curves.png", "holdout/own.json"} <= names
    assert {"trials/trial-0001/stages.jsonl", "trials/trial-0001/distill/metrics.jsonl"} <= names
    with local_file(f"{place.uri}/confirm/trial-0001/trial-0003/distill/predictions.npz") as path:
        assert len(load_predictions(path).labels) == 16
    assert not [name for name in names if name.endswith((".partial", "safetensors"))]
    for name in names:
        assert SECRET.encode() not in (place.read(name) or b""), name

    _check_runs(RunReader(f"sqlite:///{tmp_path}/mlflow.db"))
    machines()
    again = search_recipe(config, Recorder(), without_report)
    assert len(ran) == 8 and again.confirmed == result.confirmed
    machines()
    other = load_config(write_recipe(settings), ["train.batch_size=16"])
    with pytest.raises(MoeDistError, match=f"{place.uri} holds the trials of another search"):
        search_recipe(other, Recorder(), finish)

    machines()
    with local_file(f"{place.uri}/best.yaml") as path:
        best = load_config(path)
    recorder = Recorder()
    run_chain(best, recorder, until="adapt")
    assert recorder.skipped == ["finetune-teacher", "score-importance"]


def _check_runs(reader: RunReader) -> None:
    """See that one sweep has all trials, their seeds and their stages, with their curves."""
    (parent,) = reader.search(parents_only=True)
    children = reader.children([parent])[parent.run_id]
    runs = {run.name: run for run in children if run.name.startswith(("trial-", "confirm-"))}
    assert len(runs) == 3 + 4
    assert [name for name, run in runs.items() if run.tags.get("best") == "true"] == ["trial-0001"]
    for name, run in runs.items():
        assert run.status == "FINISHED", name
        stages = {stage.name: stage for stage in reader.children([run])[run.run_id]}
        assert set(stages) == {"adapt", "evaluate", "distill"}, name
        curve = reader.history(stages["distill"], "train/loss/total")
        assert [step for step, _ in curve] == [2, 3], (name, curve)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.timeout(300)
def test_several_teachers_of_a_sweep_lie_in_the_bucket(
    place: Store, write_recipe: Write, settings: dict[str, Any], machines: Callable[[], Path]
) -> None:
    settings["search"] |= {"algorithm": "grid", "baseline": False}
    settings["search"]["space"] = {"finetune.num_epochs": {"choice": [1, 2]}}
    config = load_config(write_recipe(settings), ["search.num_trials=1"])
    first = search_recipe(config, Recorder(), without_report)
    assert len(first.teachers) == 2
    # The recipe's own is where `compress` looks for it.
    models = [entry for entry in place.list("shared") if entry.name.endswith("model.safetensors")]
    assert len(models) == 1
    machines()
    recorder = Recorder()
    more = load_config(write_recipe(settings), ["search.num_trials=2"])
    result = search_recipe(more, recorder, without_report)
    assert recorder.ran == [] and result.teachers == first.teachers
    assert [trial.status for trial in result.trials.values()] == ["finished", "finished"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_trials_on_ray_tune_see_the_bucket_alone(
    place: Store, write_recipe: Write, settings: dict[str, Any], num_workers: int
) -> None:
    settings["parallel"] = {"num_workers": num_workers}
    settings["search"] |= {"num_trials": 3 - num_workers, "baseline": num_workers == 1}
    settings["search"] |= {"scheduler": "asha", "rungs": 2}
    result = search_recipe(load_config(write_recipe(settings)), Recorder(), finish)
    statuses = {number: trial.status for number, trial in result.trials.items()}
    assert set(statuses) == ({0, 1, 2} if num_workers == 1 else {1}), statuses
    first = result.trials[min(statuses)]
    assert first.status == "finished" and [one.rung for one in first.reports] == [1, 3]
    names = {entry.name for entry in place.list()}
    trial = f"trials/trial-000{first.number}"
    assert {"report.json", f"{trial}/distill/predictions.npz", f"{trial}/stages.jsonl"} <= names
    assert not [name for name in names if name.endswith("safetensors")]
