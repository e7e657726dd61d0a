"""The seeds that confirm a sweep's best, as a user sees them in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.measure import evaluation
from moe_dist.tracking import RecordedRun, RunReader
from pipelines.report.selection import select_runs
from pipelines.search import confirming
from pipelines.search import sweep as sweeping
from pipelines.search.sweep import search_recipe
from pipelines.search.trial import TrialRunner
from tests.pipelines.recorder import Recorder
from tests.pipelines.sweeps import finish, in_this_process, settings

__all__ = ["in_this_process", "settings"]
Write = Callable[[dict[str, Any]], Path]


@pytest.fixture
def confirmed_settings(
    settings: dict[str, Any],
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """A sweep of one trial, which is the best whatever it learns, and two other seeds."""
    monkeypatch.setattr(confirming, "run_sweep", sweeping.run_sweep)
    settings["train"]["num_epochs"] = 1
    settings["search"] |= {"num_trials": 1, "scheduler": "none", "rungs": 1, "confirm_seeds": 2}
    settings["search"] |= {"metric": "parameters", "space": {"moe.num_experts": {"choice": [1]}}}
    settings["tracking"] = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    return settings


def test_seeds_are_children_of_the_sweep(
    write_recipe: Write,
    confirmed_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlflow")
    config = load_config(write_recipe(confirmed_settings))
    whole = TrialRunner.__call__

    def stop_at_a_seed(self: TrialRunner, task: Any, say: Any) -> None:
        whole(self, task, say)
        if task.get("seed") == config.seed + 1 and task["number"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrialRunner, "__call__", stop_at_a_seed)
        with pytest.raises(KeyboardInterrupt):
            search_recipe(config, Recorder(), finish)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert _statuses(uri) == {"confirm-trial-0001-s1": "FINISHED", "confirm-baseline-s1": "KILLED"}
    result = search_recipe(config, Recorder(), finish)
    assert result.confirmed is not None
    assert set(_statuses(uri).values()) == {"FINISHED"} and len(_statuses(uri)) == 4

    reader = RunReader(uri)
    children = {run.name: run for run in _children(reader)}
    for role, values in (
        ("trial-0001", result.confirmed.best_values),
        ("baseline", result.confirmed.baseline_values),
    ):
        for seed, value in zip((1, 2), values, strict=True):
            run = children[f"confirm-{role}-s{seed}"]
            assert run.metrics["trial/parameters"] == value and "trial/quality" in run.metrics
            assert run.tags["confirms"] == "trial-0001" and run.tags["seed"] == str(seed)
            assert run.tags["trial"] == ("0" if role == "baseline" else "1")
            assert run.tags["trial_status"] == "finished"
            stages = reader.children([run])[run.run_id]
            assert {stage.name for stage in stages} == {"adapt", "evaluate", "distill"}
    # A sweep stands for its trials alone.
    assert {view.name for view in select_runs(["tiny search"], uri=uri)} == {
        "trial-0000",
        "trial-0001",
    }


def _children(reader: RunReader) -> list[RecordedRun]:
    parents = reader.search(parents_only=True)
    assert [run.name for run in parents] == ["tiny search"]
    return reader.children(parents)[parents[0].run_id]


def _statuses(uri: str) -> dict[str, str]:
    children = _children(RunReader(uri))
    return {run.name: run.status for run in children if run.name.startswith("confirm-")}


def test_the_teacher_is_measured_once_on_withheld_rows(
    write_recipe: Write,
    confirmed_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    confirmed_settings["data"]["holdout_samples"] = 12
    confirmed_settings["search"]["confirm_seeds"] = 0
    confirmed_settings["tracking"] = {"enabled": False}
    config = load_config(write_recipe(confirmed_settings))
    first = search_recipe(config, Recorder(), lambda *_: None)
    path = tmp_path / "outputs/tiny/search/holdout/own.json"
    kept = json.loads(path.read_text())
    assert kept["accuracy"] == first.teachers["own"].holdout_quality

    def measured_again(*_: object, **__: object) -> None:
        raise AssertionError("it was measured before")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "predict", measured_again)
        again = search_recipe(config, Recorder(), lambda *_: None)
    assert again.teachers == first.teachers
    # Of other inputs, or damaged, it counts for nothing.
    for content in (json.dumps(kept | {"fingerprint": "other", "accuracy": 7.0}), "[]"):
        path.write_text(content)
        assert search_recipe(config, Recorder(), lambda *_: None).teachers == first.teachers
    assert json.loads(path.read_text()) == kept
