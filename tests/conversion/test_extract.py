"""The dense sub-network of a task computes what the mixture computes for that task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.extract import extract_task
from moe_dist.conversion.heads import set_heads
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference import save_model
from moe_dist.moe.routing import use_task
from tests.conversion.dense_models import (
    EVERY_FAMILY,
    logits_of,
    random_scores,
    tiny_model,
    token_batch,
)
from tests.conversion.test_heads import HEADS, several_tasks

SIZES = {"num_experts": 4, "expert_size": 10, "num_shared_neurons": 4}


def trained(student: Any) -> Any:
    """Weights that have moved: experts no longer alike, gates undecided."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student


def split(model: Any, *, tie_shared: bool = True, layers: Any = None, **options: Any) -> Any:
    plan = plan_partition(random_scores(model), **SIZES, tie_shared=tie_shared, layers=layers)
    return trained(dense_to_moe(model, plan, **({"router": "task_gate"} | options)))


def answers(model: Any, task: int) -> Tensor:
    with use_task(task):
        return logits_of(model, token_batch())


@pytest.mark.parametrize("tie_shared", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("task_map", ["learned", "fixed"])
def test_every_task_is_exact(tie_shared: bool, top_k: int, task_map: str) -> None:
    student = split(several_tasks(), tie_shared=tie_shared, top_k=top_k, task_map=task_map)
    for index, head in enumerate(HEADS):
        dense = extract_task(student, head.name)
        assert type(dense).__name__ == "BertForSequenceClassification"
        expected = answers(student, index)
        assert expected.shape == (4, head.num_labels)
        assert torch.allclose(logits_of(dense, token_batch()), expected, atol=1e-5)
        private = top_k * 6
        assert dense.config.intermediate_size == (4 + private if tie_shared else 10 * top_k)


def test_a_gate_s_probability_is_folded_in() -> None:
    student = split(several_tasks(), gate_scale="probability")
    for index, head in enumerate(HEADS):
        dense = extract_task(student, head.name)
        assert torch.allclose(logits_of(dense, token_batch()), answers(student, index), atol=1e-5)


def test_layers_that_were_not_converted_stay_whole() -> None:
    student = split(several_tasks(), layers=(1,))
    dense = extract_task(student, "nli")
    assert dense.config.intermediate_size == 32
    assert torch.allclose(logits_of(dense, token_batch()), answers(student, 2), atol=1e-5)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_all_families_are_exact_for_one_task(family: str) -> None:
    student = split(tiny_model(family), num_tasks=2, top_k=2)
    dense = extract_task(student)
    assert torch.allclose(logits_of(dense, token_batch()), answers(student, 0), atol=1e-5)


def test_dense_models_and_pruned_students_can_be_taken_apart_too() -> None:
    teacher = several_tasks()
    plan = plan_partition(
        random_scores(teacher), num_experts=1, expert_size=10, num_shared_neurons=0
    )
    for model, size in ((teacher, 32), (dense_to_moe(teacher, plan), 10)):
        dense = extract_task(model, "stsb")
        assert dense.config.intermediate_size == size
        assert dense.config.problem_type == "regression"
        assert torch.allclose(logits_of(dense, token_batch()), answers(model, 1), atol=1e-5)


def test_what_cannot_be_one_dense_model_is_refused() -> None:
    student = split(several_tasks(), router="hash_random")
    with pytest.raises(ConversionError, match="different experts"):
        extract_task(student, "sst2")
    with pytest.raises(MissingInputError, match="none is named"):
        extract_task(several_tasks())
    with pytest.raises(MissingInputError, match="no task 'qqp'"):
        extract_task(several_tasks(), "qqp")


def test_plain_transformers_loads_it_without_this_project(tmp_path: Path) -> None:
    model = tiny_model("bert", num_labels=6)
    set_heads(model, HEADS)
    student = split(model)
    directory = save_model(extract_task(student, "nli"), tmp_path / "nli")
    config = json.loads((directory / "config.json").read_text())
    assert not {"moe", "task_heads"} & set(config)
    assert config["id2label"] == {"0": "yes", "1": "maybe", "2": "no"}
    batch = {name: column.tolist() for name, column in token_batch().items()}
    program = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1])\n"
        "batch = {k: torch.tensor(v) for k, v in json.loads(sys.argv[2]).items()}\n"
        "print(json.dumps(model(**batch).logits.tolist()))\n"
        "assert not any(name.startswith('moe_dist') for name in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(directory), json.dumps(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(found, answers(student, 2), atol=1e-5)
