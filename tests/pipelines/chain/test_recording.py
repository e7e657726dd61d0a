"""What a chain leaves on the tracking server: tags, models, whole metric logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.config.setting_kinds import settings_of_kind
from moe_dist.tracking import RunReader, build_tracker
from pipelines.chain.chain import run_chain
from pipelines.chain.recording import chain_tags
from pipelines.report.page import render_page
from pipelines.report.selection import select_runs
from pipelines.search.sweep import sweep_tags
from tests.pipelines.recorder import Recorder

mlflow = pytest.importorskip("mlflow")
Write = Callable[[dict[str, Any]], Path]


def test_a_chain_can_be_found_compared_and_its_student_registered_afterwards(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = write_recipe(tiny_settings | {"tracking": {"uri": store}})
    run_chain(load_config(recipe), Recorder())
    again = Recorder()
    run_chain(load_config(recipe, ["tracking.register_model=tiny-student"]), again)
    assert again.ran == []

    reader = RunReader(store)
    (run,) = reader.search(parents_only=True)
    assert run.tags["router"] == "hash_random" and len(run.tags["recipe_hash"]) == 12
    stages = {child.name: child for child in reader.children([run])[run.run_id]}
    assert "moe/load_imbalance_worst" in stages["distill"].metrics
    assert not [name for name in stages["distill"].metrics if "layer" in name]
    client = mlflow.MlflowClient(tracking_uri=store)
    artifacts = {entry.path for entry in client.list_artifacts(stages["distill"].run_id)}
    assert {"metrics.jsonl", "plots", "stage.json"} <= artifacts
    models = client.search_logged_models([run.experiment_id])
    assert sorted(model.name for model in models) == ["student", "teacher"]
    (version,) = client.search_model_versions("name = 'tiny-student'")
    assert version.run_id == run.run_id

    views = select_runs([run.run_id, str(tmp_path / "outputs/tiny")], uri=store)
    assert views[0].params == views[1].params
    assert views[0].curves == views[1].curves and views[0].loads == views[1].loads
    assert "All settings are the same" in render_page(views)


def test_tags_name_the_choices(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://ann:secret@head:10001")
    tags = chain_tags(load_config(write_recipe(tiny_settings), ["seed=3"]))
    assert tags["seed"] == "3" and tags["num_experts"] == "2"
    assert tags["mlflow.source.name"] == "moe-dist" and tags["mlflow.source.type"] == "LOCAL"
    assert "head" in tags["cluster"] and "secret" not in tags["cluster"]


def test_a_sweep_is_found_by_the_tags_of_its_chains(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    recipe = write_recipe(tiny_settings | {"parallel": {}})
    config = load_config(recipe)
    elsewhere = load_config(
        recipe, [f"output_dir={tmp_path}/other", "parallel.num_workers=2", "parallel.ep_size=2"]
    )
    tags = sweep_tags(config)
    assert tags["cluster"] == "http://head:8265" and tags == sweep_tags(elsewhere)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    with build_tracker(store).chain(
        "tiny", tmp_path / "run", params=config.flatten(), identity=settings_of_kind(config)
    ):
        pass
    (run,) = RunReader(store).search(parents_only=True)
    assert run.tags["recipe_hash"] == tags["recipe_hash"]
