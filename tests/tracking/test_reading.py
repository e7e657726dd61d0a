"""Runs as they are read back from a store."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moe_dist.errors import TrackingError
from moe_dist.tracking import RunReader, build_tracker, sort_runs
from moe_dist.tracking.connection import is_databricks
from moe_dist.tracking.reading import FEW

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{root}/mlflow.db"
    tracker = build_tracker(uri, experiment="reading")
    for number in range(3):
        directory = root / f"run-{number}"
        params = {"moe.num_experts": 2 ** (number + 1)}
        with tracker.chain(f"run-{number}", directory, params=params, tags={"kind": "x"}) as chain:
            with chain.stage("distill", directory / "distill", params={"a": 1}) as stage:
                for step in (1, 2, 3):
                    stage.log_metrics(step, {"train/loss/total": float(number + step)})
            chain.log_metrics(0, {"retention": 0.9 + 0.01 * number})
            if number == 2:
                chain.log_metrics(4, {"odd": math.nan})
            (directory / "report.json").write_text('{"name": "x"}')
            chain.log_artifact(directory / "report.json")
    return uri


def test_runs_are_found_with_children_curves_and_documents(store: str) -> None:
    reader = RunReader(store, "reading")
    parents = reader.search(parents_only=True)
    assert [run.name for run in parents] == ["run-2", "run-1", "run-0"]
    assert len(reader.search()) == 6
    run = parents[0]
    assert run.status == "FINISHED" and run.params["moe.num_experts"] == "8"
    assert run.tags["kind"] == "x" and run.ended_s is not None and run.ended_s >= run.started_s
    children = reader.children(parents)
    assert [len(children[parent.run_id]) for parent in parents] == [1, 1, 1]
    stage = children[run.run_id][0]
    assert reader.history(stage, "train/loss/total") == [(1, 3.0), (2, 4.0), (3, 5.0)]
    assert reader.history(stage, "no such metric") == []
    assert reader.history(run, "odd")[0][0] == 4 and math.isnan(reader.history(run, "odd")[0][1])
    wanted = [(one, [*one.metrics, "other"]) for one in reader.search()]
    at_once = reader.histories(wanted)
    assert len(at_once) == 6 and at_once[stage.run_id] == {
        "train/loss/total": [(1, 3.0), (2, 4.0), (3, 5.0)]
    }
    assert reader.read_json(run, "report.json") == {"name": "x"}
    assert reader.read_json(run, "other.json") == {}


def test_a_store_of_other_tables_is_read_by_mlflows_own_client(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    reader = RunReader(store, "reading")
    wanted = [(run, list(run.metrics)) for run in reader.search()]
    expected = reader.histories(wanted)

    def missing(*_: object) -> None:
        raise OperationalError("no such column", None, Exception())

    monkeypatch.setattr("moe_dist.tracking.histories._from_database", missing)
    found = reader.histories(wanted)
    assert repr(found) == repr(
        {run.run_id: {n: expected[run.run_id][n] for n in run.metrics} for run, _ in wanted}
    )


def test_runs_are_found_by_name_and_by_the_beginning_of_their_id(store: str) -> None:
    reader = RunReader(store)
    run = reader.find(["run-1"])["run-1"]
    some = ["run-1", run.run_id, run.run_id[:10], "nobody", "distill"]
    for names in (some, [*some, *(f"unknown {number}" for number in range(FEW))]):
        found = reader.find(names)
        assert list(found) == ["run-1", run.run_id, run.run_id[:10], "distill"]
        assert found["run-1"] == found[run.run_id] == found[run.run_id[:10]] == run
        assert found["distill"].parent_id


def test_filters_and_orders(store: str) -> None:
    reader = RunReader(store)
    good = reader.search("metrics.retention > 0.905", parents_only=True)
    assert {run.name for run in good} == {"run-1", "run-2"}
    everything = reader.search()
    names = [run.name for run in sort_runs(everything, "retention")]
    assert names[:3] == ["run-2", "run-1", "run-0"] and names[3:] == ["distill"] * 3
    by_size = sort_runs(everything, "moe.num_experts", ascending=True)
    assert [run.name for run in by_size][:3] == ["run-0", "run-1", "run-2"]
    with pytest.raises(TrackingError, match="does not answer this search"):
        reader.search("retention over 1")


def test_an_unknown_experiment_is_named_with_the_others(store: str) -> None:
    with pytest.raises(TrackingError, match="no experiment 'other'") as caught:
        RunReader(store, "other")
    assert "reading" in str(caught.value)


def test_reading_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="there is no database"):
        RunReader(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_databricks_without_credentials_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert is_databricks("databricks") and is_databricks("databricks://work")
    assert not is_databricks("https://databricks.example")
    for uri in ("databricks", "databricks://work"):
        with pytest.raises(TrackingError, match="DATABRICKS_HOST"):
            build_tracker(uri, experiment="/Users/me/x")
