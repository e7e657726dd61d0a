"""Runs of three levels: a sweep, its trials, and the stages that ran elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from moe_dist.metric_log import MetricLog
from moe_dist.tracking import NullTracker, RunReader, StageNote, TrackedRun, build_tracker
from moe_dist.tracking.journal import load_journal
from moe_dist.tracking.mlflow_store import MlflowStore
from moe_dist.tracking.sender import Sender

pytest.importorskip("mlflow")
BEGAN = 1_700_000_000.0


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def log_sweep(sweep: TrackedRun, directory: Path) -> None:
    """One trial with two stages; the second is measured after its end."""
    with sweep.stage("trial-0001", directory / "trial-0001", params={"x": 1}) as trial:
        for number, name in enumerate(("adapt", "distill")):
            place = directory / "trial-0001" / name
            note = StageNote(name, place, "same", BEGAN + number, params={"moe": {"top_k": 1}})
            trial.note_stage(note)
            log = MetricLog(place / "metrics.jsonl")
            log.append(1, {"train/loss/total": 0.5})
            ended = StageNote(name, place, "same", BEGAN + number, BEGAN + number + 1, "FINISHED")
            stage = trial.note_stage(ended)
        stage.log_metrics(2, {"train/loss/total": 0.25})


def check_tree(uri: str, experiment: str, tmp_path: Path) -> None:
    reader = RunReader(uri, experiment)
    (sweep,) = reader.search(parents_only=True)
    (trial,) = reader.children([sweep])[sweep.run_id]
    stages = {run.name: run for run in reader.children([trial])[trial.run_id]}
    assert set(stages) == {"adapt", "distill"} and len(reader.search()) == 4
    distill = stages["distill"]
    assert (distill.started_s, distill.ended_s) == (BEGAN + 1, BEGAN + 2)
    assert {run.status for run in stages.values()} == {"FINISHED"}
    assert distill.params == {"moe.top_k": "1"}
    assert reader.history(distill, "train/loss/total") == [(1, 0.5), (2, 0.25)]


def test_stages_stand_below_their_trial_with_their_own_times(uri: str, tmp_path: Path) -> None:
    tracker = build_tracker(uri, experiment="tree")
    with tracker.chain("sweep", tmp_path, params={"a": 1}) as sweep:
        log_sweep(sweep, tmp_path)
    check_tree(uri, "tree", tmp_path)


def test_what_a_server_lacks_is_sent_below_the_right_parents_later(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = build_tracker(uri, experiment="later")

    def away(self: MlflowStore, journal: Any) -> None:
        raise ConnectionError("the server is away")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowStore, "sync", away)
        patched.setattr("moe_dist.tracking.sender.CLOSING_TIME_S", 0.0)
        patched.setattr("moe_dist.tracking.sender.SEND_INTERVAL_S", 0.05)
        with tracker.chain("sweep", tmp_path / "old", params={"a": 1}) as sweep:
            log_sweep(sweep, tmp_path / "old")
    assert RunReader(uri, "later").search() == []
    # The output directory was moved meanwhile.
    (tmp_path / "old").rename(tmp_path / "new")
    with build_tracker(uri, experiment="later").chain("sweep", tmp_path / "new", params={"a": 1}):
        pass
    check_tree(uri, "later", tmp_path)


def test_a_stage_that_is_noted_again_is_one_run(uri: str, tmp_path: Path) -> None:
    for _ in range(2):
        with build_tracker(uri, experiment="again").chain("s", tmp_path, params={}) as sweep:
            log_sweep(sweep, tmp_path)
    reader = RunReader(uri, "again")
    assert len(reader.search()) == 4
    (distill,) = [run for run in reader.search() if run.name == "distill"]
    assert len(reader.history(distill, "train/loss/total")) == 2


def test_a_reopened_parent_takes_its_childrens_place(uri: str, tmp_path: Path) -> None:
    tracker = build_tracker(uri, experiment="reopened")
    with tracker.chain("s", tmp_path, params={}) as sweep:
        log_sweep(sweep, tmp_path)
        # As for the mark of the best trial.
        with sweep.stage("trial-0001", tmp_path / "trial-0001") as trial:
            trial.set_tags({"best": "true"})
    reader = RunReader(uri, "reopened")
    (trial_run,) = reader.search("tags.best = 'true'")
    assert trial_run.status == "FINISHED" and len(reader.search()) == 4


def test_a_run_is_reopened_while_it_is_sent(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two writers of one journal would lose what the other wrote."""
    tracker = build_tracker(uri, experiment="reopened often")
    directory = tmp_path / "trial"
    with tracker.chain("s", tmp_path, params={}) as sweep:
        for count in range(20):
            with sweep.stage("trial", directory, fingerprint="same") as trial:
                trial.set_tags({f"tag{count}": "set"})
                time.sleep(0.01)  # The sender is at work for most of the time.
    assert "takes nothing" not in caplog.text
    (run,) = RunReader(uri, "reopened often").search("tags.tag0 = 'set'")
    assert {f"tag{count}" for count in range(20)} <= run.tags.keys()
    assert run.status == "FINISHED"


def test_a_directory_that_begins_anew_forgets_the_run_before(uri: str, tmp_path: Path) -> None:
    tracker = build_tracker(uri, experiment="anew")
    directory = tmp_path / "trial"
    with tracker.chain("s", tmp_path, params={}) as sweep:
        for fingerprint in ("first", "second"):
            with sweep.stage("trial", directory, fingerprint=fingerprint) as trial:
                trial.set_tags({fingerprint: "set"})
                trial.log_metrics(1, {"x": 1.0})
    (run,) = RunReader(uri, "anew").search("tags.second = 'set'")
    assert "first" not in run.tags and run.status == "FINISHED"
    journal = load_journal(directory)
    assert journal is not None and journal.sent.run_id == run.run_id


def test_without_mlflow_the_metric_file_is_kept(tmp_path: Path) -> None:
    with NullTracker().chain("s", tmp_path, params={}) as sweep:
        stage = sweep.note_stage(StageNote("adapt", tmp_path / "adapt", "", time.time()))
        stage.log_metrics(1, {"x": 1.0})
    assert MetricLog(tmp_path / "adapt/metrics.jsonl").read()[0].metrics == {"x": 1.0}


def test_a_chain_leaves_the_journals_of_others_below_it_alone(uri: str, tmp_path: Path) -> None:
    """A search lies below the chain's directory and is a chain of its own."""
    tracker = build_tracker(uri, experiment="others")
    with tracker.chain("search", tmp_path / "search", params={"b": 1}):
        pass
    journal = tmp_path / "search/tracking.json"
    journal.write_text(journal.read_text().replace('"complete": true', '"complete": false'))
    chain: Any = tracker.chain("chain", tmp_path, params={"a": 1})
    assert isinstance(chain._sender, Sender) and chain._sender._left_behind() == []
    # Earlier versions named no parents.
    journal.write_text(journal.read_text().replace('"parent": "."', '"parent": ""'))
    (left,) = chain._sender._left_behind()
    assert left.wanted.name == "search" and left.depth == 1
