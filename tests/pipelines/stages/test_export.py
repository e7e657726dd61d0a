"""A student that does not route is a plain dense model, whatever kind of task it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.errors import ConversionError
from moe_dist.inference import load_model, load_tokenizer, save_model
from moe_dist.measure.latency import random_batch
from pipelines.cli import app
from pipelines.stages.export import export_task
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
