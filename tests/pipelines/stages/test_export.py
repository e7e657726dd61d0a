"""A student that does not route is a plain dense model, whatever kind of task it is for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_dist.config import load_config
from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.extract import extract_task
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference import load_model, load_tokenizer, save_model
from moe_dist.measure.latency import random_batch
from pipelines.cli import app
from pipelines.stages import export
from pipelines.stages.export import default_output, export_task
from pipelines.stages.export_graph import default_graph_output
from tests.conversion.dense_models import random_scores, tiny_model
from tests.inference.start_models import write_tokenizer

POOLED = {"sentence_pooling": "mean", "sentence_normalised": True}
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "ForSequenceClassification", {}),
    ("t5", "ForSequenceClassification", {}),
    ("bart", "ForSequenceClassification", {}),
    ("bert", "Model", POOLED),
    ("llama", "Model", POOLED),
    ("gpt2", "LMHeadModel", {}),
    ("llama", "ForCausalLM", {}),
    ("t5-gated", "ForConditionalGeneration", {}),
    ("bart", "ForConditionalGeneration", {}),
    ("roberta", "ForQuestionAnswering", {}),
    ("mpnet", "ForQuestionAnswering", {}),
    ("llama", "ForQuestionAnswering", {}),
    ("t5", "ForQuestionAnswering", {}),
]
every_model = pytest.mark.parametrize(("family", "head", "changes"), MODELS)


def write_student(directory: Path, family: str, head: str, changes: dict[str, Any]) -> Path:
    """Save a student that keeps 8 neurons of each FFN."""
    dense = tiny_model(family, head, **changes)
    plan = plan_partition(random_scores(dense), num_experts=1, expert_size=8, num_shared_neurons=0)
    student = dense_to_moe(dense, plan)
    write_tokenizer(directory.parent / "tokenizer", "bert")
    return save_model(student, directory, load_tokenizer(directory.parent / "tokenizer"))


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    return {name: one for name, one in output.items() if isinstance(one, torch.Tensor)}


@every_model
def test_a_pruned_student_of_each_kind_is_exported(
    family: str, head: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = write_student(tmp_path / "student", family, head, changes)
    found = CliRunner().invoke(app, ["export", str(directory), "--output", str(tmp_path / "dense")])
    assert found.exit_code == 0, found.output
    assert "8 neurons in each feed-forward layer" in " ".join(found.output.split())
    student, dense = load_model(directory), load_model(tmp_path / "dense")
    assert type(student).__name__ == f"Moe{type(dense).__name__}"
    batch = random_batch(dense, 2, 7, seed=3)
    with torch.no_grad():
        own, plain = (tensors_of(model(**batch)) for model in (student, dense))
    assert own.keys() == plain.keys()
    for name, values in own.items():
        torch.testing.assert_close(plain[name], values, rtol=1e-4, atol=1e-4, msg=name)


@every_model
def test_a_model_that_computes_something_else_is_not_exported(
    family: str,
    head: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moe_dist.conversion import extract

    directory = write_student(tmp_path / "student", family, head, changes)
    whole = extract.extract_task

    def spoilt(*given: Any) -> Any:
        dense = whole(*given)
        with torch.no_grad():
            # The last layer's: in an encoder-decoder the decoder's.
            list(dense.parameters())[-1].add_(1.0)
        return dense

    monkeypatch.setattr(extract, "extract_task", spoilt)
    with pytest.raises(ConversionError, match="outputs differ"):
        export_task(directory, None, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_an_exported_model_writes_as_its_settings_say(tmp_path: Path) -> None:
    dense = tiny_model("bart", "ForConditionalGeneration")
    plan = plan_partition(random_scores(dense), num_experts=1, expert_size=8, num_shared_neurons=0)
    student = dense_to_moe(dense, plan)
    student.generation_config.max_new_tokens = 3
    write_tokenizer(tmp_path / "tokenizer", "bart")
    save_model(student, tmp_path / "student", load_tokenizer(tmp_path / "tokenizer"))
    export_task(tmp_path / "student", None, tmp_path / "dense")
    assert load_model(tmp_path / "dense").generation_config.max_new_tokens == 3


# Merged experts

NO_PROJECT = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification as Auto
model = Auto.from_pretrained(sys.argv[1]).eval()
batch = {name: torch.tensor(rows) for name, rows in json.loads(sys.argv[2]).items()}
print(json.dumps(model(**batch).logits.tolist()))
assert not any(name.startswith("moe_dist") for name in sys.modules)
"""


def write_merged(
    directory: Path,
    router: str = "merged_task",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """Save a student whose copies of the FFN have become different experts."""
    dense = tiny_model("bert")
    sizes = {"num_experts": 4, "expert_size": 32, "num_shared_neurons": 0, "method": "full_copy"}
    student = dense_to_moe(
        dense, plan_partition(random_scores(dense), **sizes), router=router, num_tasks=1, **options
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_tokenizer(directory.parent / "tokenizer", "bert")
    tokenizer = load_tokenizer(directory.parent / "tokenizer")
    return save_model(student.to(dtype), directory, tokenizer)


@pytest.mark.parametrize("fold", [True, False])
def test_merged_experts_fold_into_a_model_that_needs_nothing_of_this_project(
    fold: bool, tmp_path: Path
) -> None:
    directory = write_merged(tmp_path / "student", top_k=2)
    command = ["export", str(directory), "--output", str(tmp_path / "dense")]
    found = CliRunner().invoke(app, command + (["--fold"] if fold else []))
    assert found.exit_code == 0, found.output
    batch = random_batch(load_model(directory), 3, 9, seed=5)
    given = json.dumps({name: rows.tolist() for name, rows in batch.items()})
    done = subprocess.run(
        [sys.executable, "-c", NO_PROJECT, str(tmp_path / "dense"), given],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    with torch.no_grad():
        expected = load_model(directory)(**batch).logits
    plain = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)


def test_a_student_in_half_precision_is_folded_without_its_rounding(tmp_path: Path) -> None:
    directory = write_merged(tmp_path / "student", top_k=3, dtype=torch.bfloat16)
    found = CliRunner().invoke(
        app, ["export", str(directory), "--fold", "--output", str(tmp_path / "dense")]
    )
    assert found.exit_code == 0, found.output
    student, dense = load_model(directory), load_model(tmp_path / "dense")
    assert dense.dtype == student.dtype == torch.bfloat16
    whole = extract_task(student.float())
    expected = {name: one.bfloat16() for name, one in whole.state_dict().items()}
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("router", "options", "words"),
    [
        ("merged_sequence", {"top_k": 2}, "merges experts anew for each sequence"),
        ("token_gate", {}, "export it with --average"),
        ("task_gate", {}, "export it without --fold"),
    ],
)
def test_what_does_not_fold_says_what_else_there_is(
    router: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    directory = write_merged(tmp_path / "student", router, **options)
    found = CliRunner().invoke(app, ["export", str(directory), "--fold"])
    assert found.exit_code != 0
    assert words in " ".join(found.output.split())
    assert not (tmp_path / "export-dense").exists()


def test_a_dense_model_has_nothing_to_fold(tmp_path: Path) -> None:
    directory = write_student(tmp_path / "student", "bert", "ForSequenceClassification", {})
    found = CliRunner().invoke(app, ["export", str(directory), "--fold"])
    assert "no merged experts to fold" in " ".join(found.output.split())


@pytest.mark.parametrize("router", ["merged_task", "merged_token"])
def test_the_average_is_measured_beside_the_model(
    router: str, tmp_path: Path, tiny_settings: dict[str, Any], write_recipe: Any
) -> None:
    directory = write_merged(tmp_path / "student", router, top_k=2)
    command = ["export", str(directory), "--average"]
    alone = CliRunner().invoke(app, command)
    assert "no recipe.yaml lies above" in " ".join(alone.output.split())
    recipe = write_recipe(tiny_settings)
    found = CliRunner().invoke(app, [*command, "--recipe", str(recipe)])
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    record = json.loads((tmp_path / "export-average/export.json").read_text())
    both = record["metrics"]
    assert (
        f"dev accuracy: {both['export']['accuracy']:.4f}, and {both['model']['accuracy']:.4f} of "
        "the model" in said
    )
    assert record["average_of"] == 4
    assert ("left out: the small network" in said) is (router == "merged_token")
    assert type(load_model(tmp_path / "export-average")).__name__ == "BertForSequenceClassification"


def test_an_average_that_cannot_be_measured_leaves_nothing(
    tmp_path: Path,
    tiny_settings: dict[str, Any],
    write_recipe: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = write_merged(tmp_path / "student", top_k=2)
    config = load_config(write_recipe(tiny_settings))
    before = set(tmp_path.iterdir())
    output = tmp_path / "average"
    measured = []

    def fail_at_the_export(_: Any, model: Path) -> dict[str, Any]:
        measured.append(model)
        if len(measured) == 2:
            assert load_model(model)
            raise MissingInputError("the dev rows are gone")
        return {"metrics": {}}

    monkeypatch.setattr(export, "_measure", fail_at_the_export)
    with pytest.raises(MissingInputError, match="are gone"):
        export_task(directory, None, output, way="average", config=config)
    assert set(tmp_path.iterdir()) == before
    # An unknown task is found before anything is measured.
    measured.clear()
    with pytest.raises(MissingInputError, match="has no task 'other'"):
        export_task(directory, "other", output, way="average", config=config)
    assert not measured
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fold", "--average"], "two models; leave one out"),
        (["--recipe", "."], "--recipe and --set say what --average is measured on"),
    ],
)
def test_options_that_contradict_each_other_are_one_fault(
    options: list[str], words: str, tmp_path: Path
) -> None:
    found = CliRunner().invoke(app, ["export", str(tmp_path), *options])
    assert found.exit_code != 0
    assert words in " ".join(found.output.split())


@pytest.mark.parametrize(
    ("model", "dense", "graph"),
    [
        ("run/distill/model", "run/export-distill-dense", "run/export-distill-onnx-fp32"),
        (
            "run/finetune-teacher/model",
            "run/export-finetune-teacher-dense",
            "run/export-finetune-teacher-onnx-fp32",
        ),
        ("run/evaluate/models/dense", "run/export-dense", "run/export-onnx-fp32"),
        ("elsewhere/model", "elsewhere/export-dense", "elsewhere/export-onnx-fp32"),
    ],
)
def test_models_of_a_run_have_exports_of_different_names(
    model: str, dense: str, graph: str, tmp_path: Path
) -> None:
    for stage in ("distill", "finetune-teacher", "evaluate"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "stage.json").write_text("{}")
    source = tmp_path / model
    assert default_output(source, None) == tmp_path / dense
    assert default_graph_output(source, None, "onnx", "fp32") == tmp_path / graph
    of_task = dense.removesuffix("-dense") + "-a"
    assert default_output(source, "a") == tmp_path / of_task
