"""`runs` and `report` on a store with finished and unfinished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dist.tracking import StageNote, build_tracker
from pipelines.benchmarks.tracking_process import log_run
from pipelines.cli import app

pytest.importorskip("mlflow")
runner = CliRunner()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{root}/mlflow.db"
    tracker = build_tracker(uri, experiment="listed")
    for number in range(3):
        log_run(tracker, root / f"run-{number}", number, 5)
    with tracker.chain("unfinished", root / "unfinished", params={"a": 1}):
        pass
    return uri


def invoke(*words: str) -> str:
    result = runner.invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def test_runs_are_listed_filtered_and_sorted(store: str) -> None:
    table = invoke("runs", "--uri", store, "--sort", "retention", "--limit", "2")
    assert "run-2" in table and "run-1" in table and "run-0" not in table
    assert table.index("run-2") < table.index("run-1")
    found = json.loads(
        invoke("runs", "--uri", store, "--filter", "metrics.retention < 0.9504", "--json")
    )
    assert [run["name"] for run in found] == ["run-0"]
    assert found[0]["params"]["seed"] == "0" and found[0]["metrics"]["retention"] == 0.95


def test_children_stand_below_their_runs(store: str) -> None:
    table = invoke("runs", "--uri", store, "--all", "--column", "section.setting_3")
    lines = [line for line in table.splitlines() if line.strip()]
    position = next(index for index, line in enumerate(lines) if line.startswith(" run-1"))
    assert lines[position + 1].startswith("   distill")


def test_runs_are_compared_in_the_terminal(store: str) -> None:
    table = invoke("runs", "run-0", "run-1", "--uri", store)
    assert "moe.num_shared_neurons" in table and "section.setting_3" not in table
    plain = json.loads(invoke("runs", "run-0", "run-1", "--uri", store, "--json"))
    assert plain["differing"] == ["moe.num_shared_neurons", "seed"]
    assert plain["runs"][1]["models"][0]["retention"] == pytest.approx(0.9505)


def test_a_report_of_recorded_runs_is_one_page(store: str, tmp_path: Path) -> None:
    page = tmp_path / "sub/page.html"
    said = invoke("report", "run-0", "run-2", "--uri", store, "--output", str(page))
    assert "2 runs" in said
    text = page.read_text()
    assert "loss: total" in text and "Load of the experts" in text and "0.951" in text


def test_missing_runs_are_all_named(store: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["report", "nobody", "run-0", "neither", "--uri", store])
    assert result.exit_code == 2
    assert "'nobody', 'neither'" in result.output and "moe-dist runs" in result.output


def test_an_empty_list_says_so(store: str) -> None:
    result = runner.invoke(app, ["runs", "--uri", store, "--filter", "metrics.retention > 2"])
    assert result.exit_code == 2 and "no run matches" in result.output


def test_a_sweep_stands_for_its_trials(store: str, tmp_path: Path) -> None:
    uri = store
    tracker = build_tracker(uri, experiment="sweeps")
    with tracker.chain("sweep", tmp_path / "sweep", params={"a": 1}) as sweep:
        for number in range(2):
            name = f"trial-{number}"
            directory = tmp_path / "sweep" / name
            with sweep.stage(name, directory, params={"moe.top_k": number}) as trial:
                trial.set_tags({"trial": str(number)})
                for stage, begun in (("adapt", 1.7e9), ("distill", 1.7e9 + 5)):
                    note = StageNote(stage, directory / stage, "", begun, begun + 5, "FINISHED")
                    run = trial.note_stage(note)
                run.log_metrics(1, {"train/loss/total": 1.0, "dev/accuracy": 0.8})
                measured = {"quality": 0.8, "accuracy": 0.8, "retention": 0.9 + number / 100}
                costs = {"flops": 1e7, "latency": 5.0, "active_parameters": 1e6}
                trial.log_metrics(2, {f"trial/{k}": v for k, v in (measured | costs).items()})
    plain = json.loads(invoke("runs", "sweep", "--uri", uri, "--json"))
    assert [run["name"] for run in plain["runs"]] == ["trial-0", "trial-1"]
    assert plain["differing"] == ["moe.top_k"]
    assert plain["runs"][1]["models"][0]["retention"] == 0.91
    assert plain["runs"][1]["main_metric"] == "accuracy"
    page = tmp_path / "page.html"
    invoke("report", "sweep", "--uri", uri, "-o", str(page))
    assert "loss: total" in page.read_text() and "Quality against cost" in page.read_text()
    assert "adapt" not in page.read_text()
    here = ("runs", "--uri", uri, "--experiment", "sweeps")
    assert "trial" not in invoke(*here)
    lines = [line.split()[0] for line in invoke(*here, "--all").splitlines()[3:8]]
    assert lines == ["sweep", "trial-0", "adapt", "distill", "trial-1"]
