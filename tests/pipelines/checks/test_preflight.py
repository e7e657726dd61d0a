"""Preflight of a tiny recipe: without Ray, on a sound cluster of two nodes, and with faults."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import preflight as cluster_preflight
from cluster import probing
from cluster.node_probe import NodeProbe
from cluster.preflight import Scope, check_slots, check_tracking
from cluster.probing import check_storage, start_probes
from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ClusterError
from moe_dist.workers.cluster_capacity import Capacity, Node, read_capacity
from moe_dist.workers.ray_session import RaySession, ray_session
from pipelines.chain.workspace import Workspace
from pipelines.checks.preflight import metric_faults
from pipelines.checks.readiness import check_cluster_once
from pipelines.cli import app
from pipelines.console import Console
from tests.ray.clusters import SmallCluster, small_cluster

Write = Callable[[dict[str, Any]], Path]


def run_preflight(recipe: Path, *options: str) -> tuple[int, list[dict[str, str]]]:
    result = CliRunner().invoke(app, ["preflight", str(recipe), "--json", *options])
    return result.exit_code, json.loads(result.stdout)["findings"]


def state_of(findings: list[dict[str, str]]) -> dict[str, str]:
    return {finding["check"]: finding["state"] for finding in findings}


def test_a_run_in_this_process_needs_no_cluster(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(tiny_settings)
    code, findings = run_preflight(recipe, "--set", "parallel.cpus_per_worker=2")
    assert code == 0 and state_of(findings) == {"recipe": "ok", "workers": "ok"}
    assert findings[1]["found"] == "one, in this process with 2 threads, no Ray"
    assert not (tmp_path / "outputs" / "tiny").exists()


def test_faults_of_the_recipe_are_findings(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings["model"]["max_length"] = 64
    tiny_settings["moe"]["expert_size"] = 64
    code, findings = run_preflight(write_recipe(tiny_settings))
    faults = [finding["found"] for finding in findings if finding["state"] == "fault"]
    assert code == 1 and len(faults) == 2
    assert "max_length" in faults[0] and "expert_size=64" in faults[1]


def test_a_table_names_the_remedy(write_recipe: Write, tiny_settings: dict[str, Any]) -> None:
    tiny_settings["data"]["train"] = "missing.jsonl"
    result = CliRunner().invoke(app, ["preflight", str(write_recipe(tiny_settings))])
    assert result.exit_code == 1
    assert "missing.jsonl" in result.stdout and "not ready" in result.stdout


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///{}/file/mlflow.db"])
def test_a_tracking_store_that_cannot_be_used(
    uri: str, write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    tiny_settings["tracking"] = {"uri": uri.format(tmp_path)}
    code, findings = run_preflight(write_recipe(tiny_settings))
    assert code == 1 and state_of(findings)["tracking"] == "fault"


def test_a_tracking_store_is_not_made_to_be_looked_at(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_settings["tracking"] = {"uri": f"sqlite:///{tmp_path}/runs/mlflow.db"}
    assert run_preflight(write_recipe(tiny_settings))[0] == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_no_secret_is_listed(
    flags: list[str], write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings["data"]["dev"] = "/gone?token=planted"
    result = CliRunner().invoke(app, ["preflight", str(write_recipe(tiny_settings)), *flags])
    assert result.exit_code == 1
    assert "/gone?token=***" in result.stdout and "planted" not in result.output


def config_of(write_recipe: Write, settings: dict[str, Any], **parallel: Any) -> RunConfig:
    return load_config(write_recipe(settings | {"parallel": {"launcher": "ray", **parallel}}))


def test_memory_and_places(write_recipe: Write, tiny_settings: dict[str, Any]) -> None:
    node = Node("id", "10.0.0.1", "", 4, 0, 8.0, 1, 0)
    capacity = Capacity((node, replace(node, node_id="other", address="10.0.0.2")))
    config = config_of(write_recipe, tiny_settings, num_workers=6)

    def check(memory_gib: float | None, config: RunConfig = config) -> dict[str, str]:
        scope = Scope(config, ray_session(), memory_gib)
        return {finding.check: finding.state for finding in check_slots(scope, capacity)}

    assert check(None) == {"workers": "warning"}
    assert check(2.5) == {"workers": "warning", "memory": "ok"}
    assert check(3.0) == {"workers": "warning", "memory": "fault"}
    two = config_of(write_recipe, tiny_settings, num_workers=2)
    assert check(8.0, two) == {"workers": "ok", "memory": "ok"}
    too_many = config_of(write_recipe, tiny_settings, num_workers=8, cpus_per_worker=2)
    assert check(1.0, too_many) == {"workers": "fault"}


def test_an_sqlite_store_on_several_nodes(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tiny_settings["tracking"] = {"enabled": True}
    config = config_of(write_recipe, tiny_settings, num_workers=2)
    assert check_tracking(config, 1) == []
    assert [finding.state for finding in check_tracking(config, 2)] == ["warning"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert [finding.state for finding in check_tracking(config, 2)] == ["fault"]
    tiny_settings["tracking"]["uri"] = "http://127.0.0.1:5000"
    served = config_of(write_recipe, tiny_settings, num_workers=2)
    assert check_tracking(served, 2) == []


@pytest.fixture(scope="module")
def cluster() -> Iterator[SmallCluster]:
    pytest.importorskip("ray")
    with small_cluster(1, 2, temp_dir="/tmp/place-pre") as cluster:
        yield cluster


@pytest.fixture
def session(cluster: SmallCluster) -> Iterator[RaySession]:
    with ray_session() as session:
        session.connect()
        yield session


ray_tests = [pytest.mark.ray, pytest.mark.timeout(600)]


class TestOnACluster:
    """One cluster serves all of these."""

    pytestmark = ray_tests

    def test_a_sound_cluster(
        self, cluster: SmallCluster, write_recipe: Write, tiny_settings: dict[str, Any]
    ) -> None:
        tiny_settings["parallel"] = {"num_workers": 2, "ep_size": 2}
        code, findings = run_preflight(write_recipe(tiny_settings))
        states = state_of(findings)
        assert code == 0 and set(states.values()) <= {"ok", "warning"}, findings
        expected = "recipe workers memory token versions storage clocks all-to-all topology"
        assert list(states) == expected.split()
        found = {finding["check"]: finding["found"] for finding in findings}
        assert "2 workers over gloo" in found["all-to-all"] and "GB/s" in found["all-to-all"]
        assert "2 node(s)" in found["versions"] and "2 node(s)" in found["storage"]

    def test_all_faults_are_listed_at_once(
        self,
        cluster: SmallCluster,
        write_recipe: Write,
        tiny_settings: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        answers = cluster_preflight.ask

        def ask(probes: Any, question: str, *arguments: Any) -> dict[str, Any]:
            told = answers(probes, question, *arguments)
            if question == "versions":
                told[min(told)]["torch"] = "2.12.0"
            return told

        monkeypatch.setattr(cluster_preflight, "ask", ask)
        tiny_settings["parallel"] = {"num_workers": 2, "cpus_per_worker": 2, "launcher": "ray"}
        code, findings = run_preflight(write_recipe(tiny_settings))
        faults = {f["check"]: f["found"] for f in findings if f["state"] == "fault"}
        assert code == 1 and list(faults) == ["workers", "versions"]
        assert "= 4 CPUs, and the Ray cluster has 3" in faults["workers"]
        assert faults["versions"].startswith("torch: 2.12.0 on ")
        assert findings[-1]["found"] == "not measured, because of the faults above"

    def test_a_cheap_check_stops_a_run_once(
        self, session: RaySession, write_recipe: Write, tiny_settings: dict[str, Any]
    ) -> None:
        config = config_of(write_recipe, tiny_settings, num_workers=2, use_gpu=True)
        workspace = Workspace(config, Console(quiet=True))
        workspace.session = session
        with pytest.raises(ClusterError, match=r"1 fault\n.*needs 2 GPUs, and the .* has 0"):
            check_cluster_once(config, workspace)
        check_cluster_once(config, workspace)

    def test_storage_that_cannot_be_written(self, session: RaySession, tmp_path: Path) -> None:
        probes, silent = start_probes(read_capacity().nodes)
        assert silent == [] and len(probes) == 2
        (tmp_path / "file").touch()
        (finding,) = check_storage(probes, tmp_path / "file" / "outputs")
        assert finding.state == "fault" and "Not a directory" in finding.found
        (fine,) = check_storage(probes, tmp_path / "outputs")
        assert fine.state == "ok" and not (tmp_path / "outputs").exists()
        (tmp_path / "mine").mkdir()
        (fine,) = check_storage(probes, tmp_path / "mine")
        assert fine.state == "ok" and list((tmp_path / "mine").iterdir()) == []

    def test_a_node_that_is_gone(
        self, session: RaySession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(probing, "ANSWER_S", 20.0)
        nodes = read_capacity().nodes
        gone = replace(nodes[0], node_id="0" * 56, address="10.9.9.9")
        probes, (finding,) = start_probes([nodes[0], gone])
        assert list(probes) == [nodes[0].address]
        assert finding.state == "fault" and finding.found.startswith("10.9.9.9 does not run")


def test_a_node_tells_whether_it_reaches_a_uri() -> None:
    probe, uri = NodeProbe(), f"memory://{uuid.uuid4().hex}/results"
    assert probe.write_token(uri, "node-0", "abc") == ""
    assert probe.read_tokens(uri, {"node-0": "abc", "node-1": "def"}) == ["node-1"]
    assert "nosuch" in probe.write_token("nosuch://bucket/results", "node-0", "abc")


def test_what_dev_rows_cannot_tell_is_said_before_the_start(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    dev = tmp_path / "dev.jsonl"
    rows = [line for line in dev.read_text().splitlines() if '"negative"' in line]
    dev.write_text("\n".join(rows) + "\n")
    tiny_settings["data"]["metrics"] = ["matthews", "f1", "accuracy"]
    config = load_config(write_recipe(tiny_settings))
    lines = metric_faults("", Workspace(config, Console(quiet=True)).splits)
    assert lines == [
        f"matthews is undefined on the dev rows: all {len(rows)} labels are 'negative'",
        f"f1 of positive is undefined on the dev rows: none of the {len(rows)} labels is "
        "'positive'",
    ]
