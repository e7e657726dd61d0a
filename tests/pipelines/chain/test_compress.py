"""The whole chain on a tiny model, in this process: results, skipping, and what re-runs."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.tracking.null import _LocalRun
from pipelines.chain import chain
from pipelines.chain.chain import plan_steps, run_chain
from pipelines.chain.workspace import Workspace
from pipelines.checks.preflight import warn_of_little_space
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]


class Collector(_LocalRun):
    """A run that remembers the files which a tracking server would get."""

    def __init__(self, directory: Path, artifacts: list[Path]) -> None:
        super().__init__(directory)
        self.artifacts = artifacts

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self.artifacts.append(path)

    def stage(self, name: str, directory: Path, **_: Any) -> Collector:
        return Collector(directory, self.artifacts)


def run(config: RunConfig, until: str = "evaluate") -> Recorder:
    recorder = Recorder()
    run_chain(config, recorder, until=until)
    return recorder


def test_steps_of_comparisons_come_before_the_evaluation(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    config = load_config(write_recipe(tiny_settings | {"compare": ["dense"]}))
    assert [step.key for step in plan_steps(config)] == [
        "finetune-teacher",
        "score-importance",
        "adapt",
        "distill",
        "adapt/dense",
        "distill/dense",
        "evaluate",
    ]
    assert [step.key for step in plan_steps(config, "adapt")] == [
        "finetune-teacher",
        "score-importance",
        "adapt",
    ]


def test_the_chain_reports_and_redoes_only_what_a_change_touches(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(tiny_settings | {"compare": ["dense"]})
    first = run(load_config(recipe, ["parallel.cpus_per_worker=1"]))
    assert len(first.ran) == 7
    assert not first.skipped

    report = json.loads((tmp_path / "outputs/tiny/report.json").read_text())
    for name in ("teacher", "student", "dense"):
        assert 0 <= report[name]["metrics"]["accuracy"] <= 1
        assert set(report[name]["latency_ms"]) == {"1", "32"}
    assert report["student"]["ffn_flops_ratio"] == pytest.approx(0.5)
    assert report["student"]["parameters"]["active"] < report["student"]["parameters"]["total"]
    for name in ("student", "dense"):
        for key in ("imitation", "imitation_before_distillation"):
            assert 0 < report[name][key]["hidden_error"] < 1
            assert report[name][key]["prediction_error"] > 0
        after, before = report[name]["imitation"], report[name]["imitation_before_distillation"]
        for measure, change in report[name]["imitation_change"].items():
            assert change["low"] <= change["difference"] <= change["high"]
            assert change["difference"] == pytest.approx(after[measure] - before[measure], abs=1e-6)
    assert "imitation" not in report["teacher"]
    assert set(report["imitation_differences"]["dense"]) == {"hidden_error", "prediction_error"}
    assert set(report["seconds"]) == set(first.ran)
    assert set(report["differences"]) == set(report["verdicts"]) == {"teacher", "dense"}
    assert (tmp_path / "outputs/tiny/report.md").read_text().startswith("# tiny")

    # Each is three times its model; what has finished needs none.
    assert not list((tmp_path / "outputs").rglob("*checkpoints*"))

    # On as many CPUs as there are, as by default.
    again = run(load_config(recipe, ["parallel.max_failures=1", "train.log_every=1"]))
    assert again.ran == []
    assert again.skipped == first.ran

    # Nothing learns from the dev rows.
    measured = run(load_config(recipe, ["data.max_dev_samples=12"]))
    assert measured.ran == ["evaluate"]

    changed = run(load_config(recipe, ["moe.router=token_gate"]))
    assert changed.ran == ["adapt", "distill", "evaluate"]

    distilled = run(load_config(recipe, ["moe.router=token_gate", "distill.kl_weight=0.5"]))
    assert distilled.ran == ["distill", "distill/dense", "evaluate"]


def test_what_goes_to_a_tracking_server_names_neither_places_nor_secrets(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Path] = []
    tracker = SimpleNamespace(chain=lambda name, directory, **_: Collector(directory, sent))
    monkeypatch.setattr(chain, "build_tracker", lambda *_, **__: tracker)
    tiny_settings["tracking"]["uri"] = "http://ann:hf_abcdefghijklmnopqrs@host/"
    config = load_config(write_recipe(tiny_settings))
    run(config)

    texts = {path.name: path.read_text() for path in sent if path.suffix != ".png"}
    assert texts.keys() == {
        "metrics.jsonl",
        "recipe.yaml",
        "report.json",
        "report.md",
        "stage.json",
    }
    for path in sent:
        content = path.read_bytes().decode("utf-8", "replace")
        for word in (str(tmp_path), tiny_settings["model"]["teacher"], "hf_abcdef", "ann:"):
            assert word not in content, path
    assert yaml.safe_load(texts["recipe.yaml"])["data"]["train"] == "train.jsonl"

    # The copy beside the results runs again as it is.
    local = load_config(tmp_path / "outputs/tiny/recipe.yaml", ["tracking.uri=http://host/"])
    assert (local.data, local.model, local.output_dir) == (
        config.data,
        config.model,
        config.output_dir,
    )


def test_a_chain_that_was_stopped_continues_where_it_was(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tiny_settings)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(chain.STAGES, "distill", stop)
        with pytest.raises(KeyboardInterrupt):
            run(load_config(recipe))
    continued = run(load_config(recipe), until="distill")
    assert continued.skipped == ["finetune-teacher", "score-importance", "adapt"]
    assert continued.ran == ["distill"]


def test_two_processes_do_not_write_one_run(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "outputs/tiny"
    root.mkdir(parents=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MoeDistError, match="another moe-dist process"):
            run(load_config(write_recipe(tiny_settings)))


def test_a_comparison_cannot_take_a_name_of_the_report(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_settings["compare"] = {"teacher": {"moe.router": "token_gate"}}
    with pytest.raises(ConfigError, match=r"compare\.teacher"):
        run(load_config(write_recipe(tiny_settings)))
    assert not (tmp_path / "outputs").exists()


def test_little_space_is_said_before_the_run(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_recipe(tiny_settings))
    recorder = Recorder()
    warnings: list[str] = []
    monkeypatch.setattr(recorder, "warn", warnings.append)
    workspace = Workspace(config, recorder)
    workspace.files.prepare("tiny")
    warn_of_little_space(workspace, 1000, num_trained=2)
    assert warnings == []
    warn_of_little_space(workspace, 10**12, num_trained=2)
    assert "may need 40978.2 GiB" in warnings[0]
