"""A student drops what it was told to, in every family, and is saved as the model that it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.training.dropout import set_dropout
from tests.conversion.dense_models import (
    FAMILY_NAMES,
    model_inputs,
    random_scores,
    tiny_model,
    token_batch,
)


def student_of(family: str) -> Any:
    model = tiny_model(family)
    plan = plan_partition(random_scores(model), num_experts=4, expert_size=8, num_shared_neurons=4)
    return dense_to_moe(model, plan, router="token_gate")


def trained_states(model: Any, seed: int) -> tuple[Tensor, ...]:
    """Hidden states of all layers in training mode."""
    model.train()
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model(**model_inputs(model, token_batch()), output_hidden_states=True)
    if model.config.is_encoder_decoder:
        return tuple(output.encoder_hidden_states + output.decoder_hidden_states)
    return tuple(output.hidden_states)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_without_dropout_training_mode_is_like_evaluation(family: str) -> None:
    student = student_of(family)
    before = student.config.to_dict()
    first, second = trained_states(student, 1), trained_states(student, 2)
    assert not torch.equal(first[-1], second[-1]), "the model has dropout of its own"

    set_dropout(student, 0.0)
    first, second = trained_states(student, 1), trained_states(student, 2)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert student.config.to_dict() == before


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_dropout_changes_where_the_model_has_some_and_nowhere_else(family: str) -> None:
    student = student_of(family)
    before = probabilities(student)
    set_dropout(student, 0.5)
    assert probabilities(student) == {
        name: 0.5 if value > 0 else 0.0 for name, value in before.items()
    }
    experts = {value for name, value in before.items() if name.endswith("experts.dropout")}
    assert experts == {
        {"bart": 0.2, "modernbert": 0.2, "t5": 0.1, "t5-gated": 0.1}.get(family, 0.0)
    }
    assert any("attn" in name.lower() or "attention" in name.lower() for name in before)


def probabilities(model: Any) -> dict[str, float]:
    """Every dropout by its path, read another way than `set_dropout` does."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        if type(module).__name__ == "Dropout":
            found[path] = module.p
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            value = getattr(module, name, None)
            if isinstance(value, float):
                found[f"{path}.{name}"] = value
    return found
