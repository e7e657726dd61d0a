"""Hidden states of one stack or two, each with the mask of its real tokens."""

from __future__ import annotations

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.hidden_states import hidden_stacks, stack_depths, with_decoder_mask
from moe_dist.moe.routing import record_routing
from moe_dist.training.step import expert_counts
from tests.conversion.dense_models import random_scores
from tests.inference.start_models import build_model

DEPTHS = {"bert": (2,), "gpt2": (2,), "t5": (1, 2), "bart": (2, 1)}


def padded(length: int = 6) -> dict[str, torch.Tensor]:
    """Two texts that end with the end token of T5 (1) or BART (2), the second one shorter."""
    ids = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 1, 0, 0]])
    ids = torch.nn.functional.pad(ids, (0, length - 5))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def inputs_of(family: str, length: int = 6) -> dict[str, torch.Tensor]:
    inputs = padded(length)
    if family == "bart":
        inputs["input_ids"] = torch.where(inputs["input_ids"] == 1, 2, inputs["input_ids"])
    return inputs


@pytest.mark.parametrize("family", DEPTHS)
def test_every_stack_shows_its_embeddings_and_layers(family: str) -> None:
    model = build_model(family).eval()
    inputs = inputs_of(family)
    with torch.no_grad():
        stacks = hidden_stacks(model(**inputs, output_hidden_states=True), inputs)
    assert stack_depths(model) == DEPTHS[family]
    assert [len(stack.states) for stack in stacks] == [depth + 1 for depth in DEPTHS[family]]
    for stack in stacks:
        assert stack.mask_BS is not None and stack.mask_BS.sum() == 8
        assert all(state.shape == (2, 6, 16) for state in stack.states)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_real_tokens_of_a_decoder_do_not_depend_on_padding(family: str) -> None:
    model = build_model(family).eval()
    seen = []
    for length in (5, 9):
        inputs = inputs_of(family, length)
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        decoder = hidden_stacks(output, inputs)[1]
        assert decoder.mask_BS is not None
        seen.append(decoder.states[-1][decoder.mask_BS.bool()])
    torch.testing.assert_close(seen[0], seen[1])


def test_what_is_given_is_kept() -> None:
    mask = torch.ones(1, 3)
    given = {"attention_mask": mask, "decoder_input_ids": torch.ones(1, 2, dtype=torch.long)}
    assert "decoder_attention_mask" not in with_decoder_mask(given)
    labels = {"attention_mask": mask, "labels": torch.ones(1, 2, dtype=torch.long)}
    assert "decoder_attention_mask" not in with_decoder_mask(labels)
    classes = {"attention_mask": mask, "labels": torch.ones(1, dtype=torch.long)}
    assert with_decoder_mask(classes)["decoder_attention_mask"] is mask
    assert with_decoder_mask({}) == {}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_student_counts_no_padding_in_its_decoder(family: str) -> None:
    dense = build_model(family).eval()
    plan = plan_partition(
        random_scores(dense), num_experts=2, expert_size=32, num_shared_neurons=32
    )
    student = dense_to_moe(dense, plan, router="hash_random")
    inputs = inputs_of(family)
    with torch.no_grad(), record_routing() as record:
        logits = student(**inputs).logits
        expected = dense(**inputs).logits
    torch.testing.assert_close(logits, expected)
    assert [int(count.sum()) for count in expert_counts(record).values()] == [8, 8, 8]
