"""compact on a trained tiny student: what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_dist.config import load_config
from moe_dist.data.metrics import METRICS
from moe_dist.inference import load_model, load_tokenizer, save_model
from moe_dist.moe.layer import moe_layers
from pipelines.chain.chain import run_chain
from pipelines.cli import app
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]


@pytest.fixture
def trained(write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path) -> Path:
    """The directory of a student of four experts."""
    tiny_settings["moe"] |= {"num_experts": 4, "expert_size": 14}
    run_chain(load_config(write_recipe(tiny_settings)), Recorder(), until="distill")
    return tmp_path / "outputs/tiny/distill/model"


def test_a_student_is_compressed_repaired_and_measured(trained: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    command = ["compact", str(trained), "--num-experts", "2", "--quiet"]
    result = CliRunner().invoke(app, [*command, "--repair-steps", "4"])
    assert result.exit_code == 0, result.output
    output = trained.parent.parent / "compact-2"
    found = json.loads((output / "compact.json").read_text())
    for name in ("before", "compressed", "repaired"):
        assert 0 <= found[name]["metrics"]["accuracy"] <= 1
        assert name in result.output
    assert found["before"]["retention"] == 1
    assert found["repaired"]["parameters"]["total"] < found["before"]["parameters"]["total"]
    assert found["repaired"]["parameters"]["active"] == found["before"]["parameters"]["active"]
    for layer in found["layers"]:
        assert sum(layer["use"]) == pytest.approx(1.0)
        assert sorted(expert for group in layer["groups"] for expert in group) == [0, 1, 2, 3]
    model = load_model(output / "model")
    assert {layer.num_experts for layer in moe_layers(model)} == {2}
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    assert not (output / "checkpoints").exists()

    again = CliRunner().invoke(
        app, [*command, "--repair-steps", "0", "--method", "drop", "--tolerance", "9"]
    )
    assert again.exit_code == 0, again.output
    found = json.loads((output / "compact.json").read_text())
    assert found["num_fused_neurons"] > 0 and "repaired" not in found
    assert "fused" in found and "fused" in again.output


def test_experts_are_joined_and_pruned_in_one_go(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_dist.jobs.distill import DistillJob

    taught: list[str] = []
    run = DistillJob.run

    def spied(job: DistillJob) -> Any:
        taught.append(job.teacher)
        return run(job)

    monkeypatch.setattr(DistillJob, "run", spied)
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    teacher = trained.parent.parent / "finetune-teacher/model"
    command = ["compact", str(trained), "--num-experts", "2", "--expert-size", "5", "--quiet"]
    result = CliRunner().invoke(app, [*command, "--repair-steps", "4", "--teacher", str(teacher)])
    assert result.exit_code == 0, result.output
    output = trained.parent.parent / "compact-2-size-5"
    found = json.loads((output / "compact.json").read_text())
    assert found["expert_size"] == 5 and found["repaired_by"] == "teacher"
    assert taught == [str(teacher)]
    for layer in found["layers"]:
        assert len(layer["groups"]) == 2 == len(layer["own_ids"])
        assert {len(ids) for ids in layer["own_ids"]} == {5 - len(layer["shared_ids"])}
        assert 0 < layer["kept_importance"] < 1
    active = [found[name]["parameters"]["active"] for name in ("before", "repaired")]
    assert active[1] < active[0]
    for layer in moe_layers(load_model(output / "model")):
        assert layer.num_experts == 2
    assert not (output / "unpruned").exists() and not (output / "scores.safetensors").exists()
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_what_cannot_be_compacted_is_one_message(
    trained: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def refused(*words: str) -> str:
        result = CliRunner().invoke(app, ["compact", *words])
        assert result.exit_code == 2 and "Traceback" not in result.output
        return result.output

    assert "not fewer" in refused(str(trained), "--num-experts", "4")
    assert "merge or drop" in refused(str(trained), "--num-experts", "2", "--method", "both")
    assert "nothing to do" in refused(str(trained))
    assert "use 1 to 13" in refused(str(trained), "--expert-size", "14")
    teacher = trained.parent.parent / "finetune-teacher/model"
    assert "no experts" in refused(str(teacher), "--num-experts", "2")
    alone = tmp_path_factory.mktemp("alone")
    assert "--recipe" in refused(str(alone), "--num-experts", "2")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    words = [str(trained), "--num-experts", "2", "--output", str(full)]
    result = CliRunner().invoke(app, ["compact", *words])
    assert result.exit_code != 0 and "not a compaction's" in result.output
    assert (full / "thesis.txt").read_text() == "mine"


def test_a_teacher_of_another_kind_is_refused_before_anything_starts(
    trained: Path, tmp_path: Path
) -> None:
    teacher = trained.parent.parent / "finetune-teacher/model"
    output = tmp_path / "smaller"

    def refused(directory: Path, *words: str) -> str:
        command = ["compact", str(trained), "--expert-size", "5", "--output", str(output)]
        result = CliRunner().invoke(app, [*command, "--teacher", str(directory), *words])
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        assert not output.exists()
        return " ".join(result.output.split())

    assert "--repair-steps=0" in refused(teacher, "--repair-steps", "0")

    model = load_model(teacher)
    tokenizer = load_tokenizer(teacher)
    vocab = tokenizer.get_vocab()
    words = sorted(vocab, key=lambda word: vocab[word])
    words[-1], words[-2] = words[-2], words[-1]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    swapped = type(tokenizer)(str(tmp_path / "vocab.txt"))
    save_model(model, tmp_path / "swapped", tokenizer=swapped)
    assert "different vocabularies" in refused(tmp_path / "swapped")

    model.config.id2label = {0: "yes", 1: "no"}
    save_model(model, tmp_path / "labels", tokenizer=tokenizer)
    assert "differ in labels" in refused(tmp_path / "labels")

    save_model(model.bert, tmp_path / "headless", tokenizer=tokenizer)
    assert "differ in kind" in refused(tmp_path / "headless")

    model.config.num_hidden_layers = 1
    shallow = type(model)(model.config)
    save_model(shallow, tmp_path / "shallow", tokenizer=tokenizer)
    found = refused(tmp_path / "shallow")
    assert "differ in layers" in found and "differ in labels" in found


def test_an_output_never_takes_the_place_of_an_input(trained: Path) -> None:
    teacher = trained.parent.parent / "finetune-teacher/model"
    for inside, words in ((trained, []), (teacher, ["--teacher", str(teacher)])):
        (inside.parent / "compact.json").write_text("{}")
        before = sorted(path.name for path in inside.iterdir())
        command = ["compact", str(trained), "--expert-size", "5", *words]
        result = CliRunner().invoke(app, [*command, "--output", str(inside.parent)])
        assert result.exit_code == 2 and "cleared first" in result.output
        assert sorted(path.name for path in inside.iterdir()) == before


def test_where_lower_is_better_retention_is_teacher_over_student(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METRICS, "accuracy", replace(METRICS["accuracy"], higher_is_better=False))
    tiny_settings["moe"] |= {"num_experts": 4, "expert_size": 14}
    run_chain(load_config(write_recipe(tiny_settings)), Recorder())
    run = tmp_path / "outputs/tiny"
    report = json.loads((run / "report.json").read_text())
    assert report["higher_is_better"] is False
    whole, own = (report[name]["metrics"]["accuracy"] for name in ("teacher", "student"))
    assert report["retention"] == pytest.approx(whole / own)
    assert "dev accuracy (lower is better)" in (run / "report.md").read_text()

    command = ["compact", str(run / "distill/model"), "--num-experts", "2", "--quiet"]
    done = CliRunner().invoke(app, [*command, "--repair-steps", "0"])
    assert done.exit_code == 0, done.output
    found = json.loads((run / "compact-2/compact.json").read_text())
    assert found["higher_is_better"] is False
    values = {name: found[name]["metrics"]["accuracy"] for name in ("before", "compressed")}
    kept = values["before"] / values["compressed"]
    assert found["compressed"]["retention"] == pytest.approx(kept)
