"""Tracking end to end in a sqlite store: what arrives, once, and what is kept out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from moe_dist.metric_log import MetricLog
from moe_dist.tracking import (
    DatasetInput,
    NullTracker,
    Tracker,
    build_tracker,
    flatten,
    redact_uri,
    scrub,
)
from moe_dist.tracking.mlflow_store import MlflowStore
from moe_dist.uris import absolute_sqlite
from pipelines.console import Console
from tests.tracking.servers import points

mlflow = pytest.importorskip("mlflow")
make_url = pytest.importorskip("sqlalchemy.engine").make_url

CONFIG = {
    "name": "demo",
    "moe": {"num_experts": 4, "layers": [0, 1]},
    "tracking": {
        "uri": "https://ann:pw@mlflow.example/path",
        "hub_token": "hf_abcdefghijklmnopqrs",
    },
    "output_dir": "/home/ann/outputs",
}


@pytest.fixture(scope="module")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def tracker(sqlite_uri: str) -> Tracker:
    return build_tracker(sqlite_uri, experiment="tests")


@pytest.fixture
def client(sqlite_uri: str) -> Any:
    return mlflow.MlflowClient(tracking_uri=sqlite_uri)


def child_runs(client: Any, run_id: str | None) -> list[Any]:
    experiment = client.get_run(run_id).info.experiment_id
    return list(
        client.search_runs([experiment], filter_string=f"tags.`mlflow.parentRunId` = '{run_id}'")
    )


def test_chain_and_stage_arrive_whole(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    plot = tmp_path / "distill" / "loss.png"
    with tracker.chain("demo", tmp_path, params=CONFIG, tags={"kind": "chain"}) as chain:
        assert chain.run_id is not None
        with chain.stage(
            "distill", plot.parent, params={"train": {"learning_rate": 5e-5}}
        ) as stage:
            log = MetricLog(plot.parent / "metrics.jsonl")
            for step in range(1, 6):
                log.append(step, {"train/loss": 1.0 / step, "moe/load_imbalance/0": 1.5})
            stage.log_metrics(5, {"dev/accuracy": 0.5})
            stage.log_dataset(DatasetInput("demo (train)", "f" * 64, "package", num_rows=9))
            plot.write_bytes(b"picture")
            stage.log_artifact(plot, folder="plots")
        report.write_text("# Report")
        chain.log_artifact(report)

    parent = client.get_run(chain.run_id)
    assert parent.info.status == "FINISHED" and parent.info.run_name == "demo"
    assert parent.data.params["moe.num_experts"] == "4"
    assert parent.data.tags["kind"] == "chain"
    assert [entry.path for entry in client.list_artifacts(chain.run_id)] == ["report.md"]
    (child,) = child_runs(client, chain.run_id)
    assert child.info.run_id == stage.run_id and child.info.status == "FINISHED"
    assert child.data.params == {"train.learning_rate": "5e-05"}
    assert points(client, stage.run_id, "train/loss") == [(n, 1.0 / n) for n in range(1, 6)]
    assert points(client, stage.run_id, "dev/accuracy") == [(5, 0.5)]
    (given,) = child.inputs.dataset_inputs
    assert given.dataset.name == "demo (train)" and given.tags[0].value == "training"
    assert [e.path for e in client.list_artifacts(stage.run_id, "plots")] == ["plots/loss.png"]


def test_nothing_private_is_sent(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    with tracker.chain("private", tmp_path, params=CONFIG) as chain:
        chain.set_tags({"where": "/home/ann/data.tsv"})
    run = client.get_run(chain.run_id)
    sent = str(run.data.params) + str(run.data.tags)
    assert "ann" not in sent and "pw" not in sent and "hf_" not in sent
    assert run.data.params["tracking.uri"] == "https://mlflow.example/path"
    assert run.data.params["output_dir"] == "outputs"


def test_resumed_run_goes_on_without_double_points(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "distill"
    log = MetricLog(directory / "metrics.jsonl")
    run_ids = []
    for first in (1, 3):  # the second process resumes from the checkpoint of step 2
        log.truncate_after(first - 1)
        stopped = False
        try:
            with tracker.chain("x", tmp_path, params={}) as chain:  # noqa: SIM117
                with chain.stage("distill", directory, fingerprint="same") as stage:
                    for step in range(first, first + 4):
                        log.append(step, {"loss": float(step), "lr": 0.1})
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            stopped = True
        assert stopped
        run_ids.append((chain.run_id, stage.run_id))
    assert run_ids[0] == run_ids[1]
    assert client.get_run(stage.run_id).info.status == "KILLED"
    assert points(client, stage.run_id, "loss") == [(n, float(n)) for n in range(1, 7)]
    assert len(child_runs(client, chain.run_id)) == 1


def test_lost_journal_of_what_was_sent_doubles_nothing(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    """As after a kill between MLflow's answer and the note of it."""
    MetricLog(tmp_path / "metrics.jsonl").append(1, {"loss": 1.0})
    with tracker.chain("x", tmp_path, params={}) as chain:
        pass
    journal = tmp_path / "tracking.json"
    content = json.loads(journal.read_text())
    content["sent"].update(last_steps={}, params={}, complete=False)
    journal.write_text(json.dumps(content))
    MetricLog(tmp_path / "metrics.jsonl").append(2, {"loss": 2.0})
    with tracker.chain("x", tmp_path, params={}) as again:
        pass
    assert again.run_id == chain.run_id
    assert points(client, chain.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_other_fingerprint_begins_another_run(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    run_ids = set()
    for fingerprint in ("old", "new"):
        with (
            tracker.chain("x", tmp_path, params={}) as chain,
            chain.stage("adapt", tmp_path / "adapt", fingerprint=fingerprint) as stage,
        ):
            pass
        run_ids.add(stage.run_id)
    assert len(run_ids) == 2
    assert len(child_runs(client, chain.run_id)) == 2


def test_chain_goes_on_where_only_other_settings_than_its_identity_change(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    own = {"seed": 0, "train": {"batch_size": 8}}
    first = {"seed": 0, "train.batch_size": 8, "parallel.num_workers": 1}
    with (
        tracker.chain("x", tmp_path, params=first, identity=own) as chain,
        chain.stage("distill", tmp_path / "distill", fingerprint="f"),
    ):
        pass
    changed = {**first, "parallel.num_workers": 2, "parallel.zero": 1}
    with tracker.chain("x", tmp_path, params=changed, identity=own) as again:
        pass
    assert again.run_id == chain.run_id
    run = client.get_run(chain.run_id)
    assert run.info.status == "FINISHED" and len(child_runs(client, chain.run_id)) == 1
    assert run.data.params["parallel.num_workers"] == "1"
    assert run.data.params["parallel.zero"] == "1"
    assert run.data.tags["changed.parallel.num_workers"] == "2"
    for name, identity in (("x", {**own, "seed": 99}), ("another", own)):
        with tracker.chain(name, tmp_path, params=changed, identity=identity) as other:
            pass
        assert other.run_id != chain.run_id


def test_second_report_of_a_chain_shows_its_new_values(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    nan = float("nan")

    def report(**metrics: float) -> str | None:
        with tracker.chain("x", tmp_path, params={"a": 1}) as chain:
            log.truncate_after(-1)  # as the pipeline does before each report
            chain.log_metrics(0, metrics)
        return chain.run_id

    run_id = report(retention=0.90, size=7.0, broken=nan)
    report(retention=0.95, size=7.0, broken=nan)
    for _ in range(2):
        assert report(retention=0.93, size=7.0, broken=nan, dense=0.8) == run_id
    retention = [(0, 0.90), (1, 0.95), (2, 0.93)]
    assert points(client, run_id, "retention") == retention
    assert points(client, run_id, "size") == [(0, 7.0)]
    assert points(client, run_id, "dense") == [(0, 0.8)]
    assert len(points(client, run_id, "broken")) == 1

    # A journal of before values were noted, or one that was lost, learns them from the server.
    journal = tmp_path / "tracking.json"
    content = json.loads(journal.read_text())
    del content["sent"]["last_values"]
    journal.write_text(json.dumps(content))
    report(retention=0.93, size=7.0, broken=nan, dense=0.8)
    assert points(client, run_id, "retention") == retention


def test_stage_that_logs_a_step_again_keeps_its_first_value(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    log = MetricLog(tmp_path / "distill" / "metrics.jsonl")
    for loss in (2.0, 1.0):
        log.truncate_after(0)
        log.append(1, {"loss": loss})
        with (
            tracker.chain("x", tmp_path, params={"a": 1}) as chain,
            chain.stage("distill", tmp_path / "distill", fingerprint="f") as stage,
        ):
            pass
    assert points(client, stage.run_id, "loss") == [(1, 2.0)]


def test_parent_left_running_by_a_killed_driver_is_closed(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    with tracker.chain("other", tmp_path / "other", params={"a": 1}) as other:
        left = tracker.chain("x", tmp_path / "x", params={"a": 1})
        left.__enter__()  # and never left
        assert client.get_run(left.run_id).info.status == "RUNNING"
        with tracker.chain("x", tmp_path / "x", params={"a": 2}) as chain:
            assert client.get_run(left.run_id).info.status == "KILLED"
            assert client.get_run(other.run_id).info.status == "RUNNING"
        with tracker.chain("x", tmp_path / "x", params={"a": 3}):
            assert client.get_run(chain.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    "name", ["my runs/ml'flow", "x #1", "100%", "a%20b", "what?", "me@home", "br[red]ackets :x:"]
)
def test_open_hint_can_be_pasted_into_a_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    database = tmp_path / name / "flow.db"
    uri = absolute_sqlite(f"sqlite:///{quote(str(database))}")
    with build_tracker(uri).chain("x", tmp_path / "run", params={}) as chain:
        hint = chain.open_hint()
    assert database.is_file()
    Console().result(f"MLflow: {hint}")
    command = shlex.split(capsys.readouterr().out.removeprefix("MLflow: "))
    assert command[:3] == ["mlflow", "ui", "--backend-store-uri"]
    (store,) = command[3:]
    assert make_url(store).database == str(database)
    client = mlflow.MlflowClient(tracking_uri=store)
    assert client.get_run(chain.run_id).data.params == {}


def test_a_hint_hides_the_password_alone() -> None:
    store = MlflowStore.__new__(MlflowStore)
    store.shown_uri = store._uri = "postgresql://ann:pw@db/x?sslmode=require"
    expected = "mlflow ui --backend-store-uri 'postgresql://***@db/x?sslmode=require'"
    assert store.run_location("1") == expected


def test_an_experiment_opens_as_one_of_trained_models_unless_its_owner_chose(
    client: Any, tmp_path: Path, sqlite_uri: str
) -> None:
    with build_tracker(sqlite_uri, experiment="new").chain("x", tmp_path / "x", params={}):
        pass
    tags = client.get_experiment_by_name("new").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(tags["mlflow.sharedViewState.moe-dist"])
    assert view["name"] == "moe-dist" and view["createdAt"] > 0
    columns = json.loads(view["state"])["selectedColumns"]
    assert "metrics.`retention`" in columns and "attributes.`Source`" in columns
    older = client.create_experiment("older", tags={"mlflow.experimentKind": "genai_development"})
    build_tracker(sqlite_uri, experiment="older")
    tags = client.get_experiment(older).tags
    assert tags["mlflow.experimentKind"] == "genai_development"
    assert "mlflow.sharedViewState.moe-dist" in tags


def test_stages_have_the_source_of_their_chain(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    source = {"mlflow.source.name": "moe-dist", "mlflow.source.type": "LOCAL"}
    with (
        tracker.chain("x", tmp_path, params={}, tags={**source, "router": "a"}) as chain,
        chain.stage("adapt", tmp_path / "adapt") as stage,
    ):
        pass
    for run_id in (chain.run_id, stage.run_id):
        assert source.items() <= client.get_run(run_id).data.tags.items()
    assert "router" not in client.get_run(stage.run_id).data.tags


def test_failed_stage_is_marked(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError),
        tracker.chain("x", tmp_path, params={}) as chain,
        chain.stage("adapt", tmp_path / "adapt") as stage,
    ):
        raise ValueError("broken")
    assert client.get_run(stage.run_id).info.status == "FAILED"
    assert client.get_run(chain.run_id).info.status == "FAILED"


def test_run_that_was_deleted_is_made_again(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    with tracker.chain("x", tmp_path, params={"a": 1}) as chain:
        chain.log_metrics(1, {"loss": 1.0})
    client.delete_run(chain.run_id)
    with tracker.chain("x", tmp_path, params={"a": 1}) as again:
        pass
    assert again.run_id != chain.run_id
    assert points(client, again.run_id, "loss") == [(1, 1.0)]
    assert client.get_run(again.run_id).data.params == {"a": "1"}


def test_long_and_odd_values_are_cut_to_what_mlflow_takes(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    many = {f"p{index}": index for index in range(230)}
    with tracker.chain("x", tmp_path, params={**many, "long": "y" * 9000}) as chain:
        chain.log_metrics(1, {"loss (dev)": 1.0, "nan": float("nan")})
    run = client.get_run(chain.run_id)
    assert len(run.data.params) == 231 and len(run.data.params["long"]) == 6000
    assert run.data.metrics["loss _dev_"] == 1.0 and "nan" in run.data.metrics


def test_null_tracker_keeps_the_metric_file(tmp_path: Path) -> None:
    tracker = build_tracker("http://127.0.0.1:9", enabled=False)
    assert isinstance(tracker, NullTracker)
    with (
        tracker.chain("x", tmp_path, params={}) as chain,
        chain.stage("s", tmp_path / "s") as stage,
    ):
        stage.log_metrics(3, {"a": 1.0})
    assert MetricLog(tmp_path / "s" / "metrics.jsonl").read()[0].step == 3
    assert chain.run_id is None and chain.open_hint() == ""


def test_flatten_and_scrub() -> None:
    assert flatten({}) == {}
    assert flatten({"compare": {}, "moe": {"top_k": 1}}) == {"compare": "{}", "moe.top_k": "1"}
    flat = flatten(CONFIG)
    assert flat["moe.layers"] == "[0, 1]" and flat["tracking.hub_token"] == "(hidden)"
    assert scrub({"uri": "sqlite:////home/ann/mlflow.db"}) == {"uri": "sqlite:///mlflow.db"}
    assert scrub("see hf_abcdefghijklmnopqrs") == "see ***"
    assert scrub({"max_tokens": 5, "token": None}) == {"max_tokens": 5, "token": None}
    assert redact_uri("postgresql://u:p@db:5432/x?sslkey=a") == "postgresql://db:5432/x"
    assert redact_uri("http://u:p/a?b@host:80/x") == "http://host:80/x"
    assert redact_uri("mlflow.db") == "mlflow.db"
    assert redact_uri("sqlite:////home/a@b/x #1/m.db?mode=ro") == "sqlite:////home/a@b/x #1/m.db"
