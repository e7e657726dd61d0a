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
from moe_dist.moe.routing import use_samples
from moe_dist.tasks.causal_lm import CausalLM
from moe_dist.training.balance import balance_term, made_choices
from moe_dist.training.step import GateSum, distill_terms, freeze
from tests.conversion.dense_models import random_scores, tiny_model
from tests.moe.merged import draw_gates
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


def test_the_balance_of_a_decoder_is_that_of_its_segments() -> None:
    length = 3
    teacher = tiny_model("llama", attention_dropout=0.0)
    sizes = {"num_experts": 4, "expert_size": 8, "num_shared_neurons": 0}
    plan = plan_partition(random_scores(teacher), **sizes)
    student = dense_to_moe(
        teacher, plan, router="merged_sequence", top_k=2, segment_length=length
    ).train()
    draw_gates(student)
    freeze(teacher)
    encoded = blocks()

    def sums(accumulation: int) -> tuple[dict[str, GateSum], int, Any]:
        (step,) = TrainBatches(encoded, batch_size=len(encoded), accumulation=accumulation).epoch(0)
        found: dict[str, GateSum] = {}
        num_segments, start = 0, 0
        for batch in step.micro_batches:
            stop = start + len(batch["input_ids"])
            samples, start = torch.tensor(step.sample_ids[start:stop]), stop
            num_segments += sum(-(-int(one) // length) for one in batch["attention_mask"].sum(1))
            with use_samples(samples, 7):
                computed = distill_terms(
                    student, teacher, batch, objectives=(), load_balancing=True
                )
            for name, own in computed.gate_sums.items():
                found[name] = own if name not in found else added(found[name], own)
        return found, num_segments, computed

    whole, num_segments, computed = sums(1)
    cut, same_number, _ = sums(3)
    assert num_segments == same_number > len(encoded)
    for name, own in whole.items():
        assert own.load_E is not None
        # Each segment counts once: its weights sum to 1, and K experts are in its merge.
        assert own.probability_E.sum().item() == pytest.approx(num_segments)
        assert own.load_E.sum().item() == pytest.approx(2 * num_segments, rel=0.2)
        torch.testing.assert_close(cut[name].probability_E, own.probability_E)
        torch.testing.assert_close(cut[name].load_E, own.load_E)
    balance_term(computed.gate_sums, made_choices(computed)).sum.backward()
    for name, parameter in student.named_parameters():
        if ".gate.weight" in name or name.endswith("first_segment"):
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def added(one: GateSum, other: GateSum) -> GateSum:
    assert one.load_E is not None and other.load_E is not None
    return GateSum(one.probability_E + other.probability_E, one.top_k, one.load_E + other.load_E)
