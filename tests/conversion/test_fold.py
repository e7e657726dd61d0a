"""Merged experts folded into a plain dense model, and the average of all experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.extract import extract_task
from moe_dist.conversion.families import find_slots
from moe_dist.errors import ConversionError
from moe_dist.moe.merge_gates import NoisyTopK
from tests.conversion.dense_models import (
    EVERY_FAMILY,
    NUM_NEURONS,
    logits_of,
    random_scores,
    tiny_model,
    token_batch,
)
from tests.conversion.test_extract import answers, trained
from tests.conversion.test_heads import HEADS, several_tasks

COPIES: dict[str, Any] = {
    "num_experts": 4,
    "expert_size": NUM_NEURONS,
    "num_shared_neurons": 0,
    "method": "full_copy",
}


def merged(model: Any, router: str = "merged_task", **options: Any) -> Any:
    """A student whose copies have become different experts, and whose gates tell tasks apart."""
    sizes = {key: options.pop(key) for key in list(options) if key in (*COPIES, "tie_shared")}
    plan = plan_partition(random_scores(model), **(COPIES | sizes))
    student = trained(dense_to_moe(model, plan, router=router, **({"top_k": 2} | options)))
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, NoisyTopK):
                module.gate.weight.normal_()
    return student.eval()


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_folds(family: str) -> None:
    dense = tiny_model(family)
    student = merged(dense, num_tasks=1)
    folded = extract_task(student)
    assert type(folded) is type(dense)
    assert not hasattr(folded.config, "moe")
    torch.testing.assert_close(
        logits_of(folded, token_batch()), logits_of(student, token_batch()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 4},
        {"merge_gates": "one"},
        {"expert_size": 10, "num_shared_neurons": 4, "method": "importance", "tie_shared": True},
    ],
    ids=str,
)
def test_each_task_s_part_is_a_model_of_its_own(options: dict[str, Any]) -> None:
    student = merged(several_tasks(), **options)
    logits = []
    for index, head in enumerate(HEADS):
        folded = extract_task(student, head.name)
        expected = answers(student, index)
        assert expected.shape == (4, head.num_labels)
        torch.testing.assert_close(logits_of(folded, token_batch()), expected, rtol=1e-5, atol=1e-5)
        logits.append(find_slots(folded)[0].weights().w_in)
        assert len(logits[-1]) == options.get("expert_size", NUM_NEURONS)
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("router", ["merged_sequence", "merged_token"])
def test_what_is_merged_for_each_sequence_does_not_fold(router: str) -> None:
    student = merged(tiny_model("bert"), router)
    with pytest.raises(ConversionError, match=r"anew for each sequence.*\n.*--average"):
        extract_task(student)


@pytest.mark.parametrize("router", ["merged_task", "merged_sequence", "token_gate"])
def test_the_average_of_all_experts_is_the_mean_of_their_weights(router: str) -> None:
    student = merged(tiny_model("bert"), router, num_tasks=1)
    average = extract_task(student, average=True)
    weights = find_slots(average)[0].weights()
    experts = next(m for m in student.modules() if type(m).__name__ == "Experts")
    for name in ("w_in", "b_in", "w_out", "b_out"):
        found, stacked = getattr(weights, name), getattr(experts, name)
        assert found is not None
        torch.testing.assert_close(found, stacked.mean(dim=0), rtol=1e-5, atol=1e-6)
    # Experts that are still copies are their own average.
    dense = tiny_model("bert")
    plan = plan_partition(random_scores(dense), **COPIES)
    copies = dense_to_moe(dense, plan, router=router, num_tasks=1, top_k=2)
    torch.testing.assert_close(
        logits_of(extract_task(copies, average=True), token_batch()),
        logits_of(dense, token_batch()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_has_no_average_is_refused() -> None:
    sizes = {"expert_size": 8, "method": "importance"}
    with pytest.raises(ConversionError, match="other neurons at the same place"):
        extract_task(merged(tiny_model("bert"), "token_gate", **sizes), average=True)
    with pytest.raises(ConversionError, match="no experts to be averaged"):
        extract_task(merged(tiny_model("bert"), num_experts=1), average=True)
    with pytest.raises(ConversionError, match="no experts to be averaged"):
        extract_task(tiny_model("bert"), average=True)
