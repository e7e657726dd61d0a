"""A step of a language model is the same however it is cut into micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.data.encoding import Encoded
from moe_dist.data.loaders import TrainBatches
from moe_dist.losses.total import weighted_total
from moe_dist.tasks.causal_lm import CausalLM
from moe_dist.training.step import distill_terms, freeze
from tests.conversion.dense_models import random_scores, tiny_model
from tests.tasks.test_causal_lm import Letters, rows

TEXTS = ("abcdefgh", "ij", "klmnopqrstu", "vwxyzabc", "defg", "hijklmnop")


def blocks() -> Encoded:
    made = CausalLM().tokens(rows(*TEXTS), Letters(), max_length=8, is_training=True)
    lengths = [len(ids) for ids in made.input_ids]
    assert len(set(made.num_targets or ())) > 1
    return Encoded(
        input_ids=np.concatenate(made.input_ids).astype(np.int32),
        token_type_ids=None,
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        labels=np.zeros(len(lengths), np.int64),
        sample_ids=np.asarray(made.rows, np.int64),
        columns={"next_ids": np.concatenate(made.columns["next_ids"]).astype(np.int32)},
        num_targets=np.asarray(made.num_targets),
    )


def gradients(student: Any, teacher: Any, encoded: Encoded, accumulation: int) -> list[Any]:
    (step,) = TrainBatches(encoded, batch_size=len(encoded), accumulation=accumulation).epoch(0)
    student.zero_grad()
    counts = {
        "samples": step.num_samples,
        "tokens": step.num_tokens,
        "targets": step.num_targets,
        "steps": 1,
    }
    shown: dict[str, float] = {}
    for batch in step.micro_batches:
        found = distill_terms(
            student, teacher, batch, objectives=("prediction_kl", "hidden_mse"), z_loss=True
        )
        weights = dict.fromkeys(found.terms, 1.0)
        total, parts = weighted_total(found.terms, weights, counts)  # type: ignore[arg-type]
        total.backward()  # type: ignore[no-untyped-call]
        for name, value in parts.items():
            shown[name] = shown.get(name, 0.0) + float(value)
    values = [torch.tensor([shown["task"], shown["prediction_kl"], shown["hidden_mse"]])]
    return values + [one.grad.clone() for one in student.parameters() if one.grad is not None]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_micro_batches_add_up_to_the_step(family: str) -> None:
    teacher = tiny_model(family)
    plan = plan_partition(
        random_scores(teacher), num_experts=2, expert_size=16, num_shared_neurons=4
    )
    student = dense_to_moe(teacher, plan, seed=0, router="hash_random").eval()
    encoded = blocks()
    whole = gradients(student, freeze(teacher), encoded, 1)
    cut = gradients(student, teacher, encoded, 3)
    assert float(whole[0][1]) > 0
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
