"""What every family must do, whatever its names and layouts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dist.conversion import dense_to_moe, plan_partition, score_importance
from moe_dist.conversion.families import FAMILIES, find_slots, position_limit
from moe_dist.conversion.hidden_states import hidden_stacks, stack_depths
from moe_dist.conversion.output_fit import fit_outputs
from moe_dist.errors import MissingInputError
from moe_dist.measure.profile import count_parameters, flops_per_token
from moe_dist.moe.layer import moe_layers
from moe_dist.moe.merge import linear_names
from moe_dist.moe.routing import record_routing
from moe_dist.training.step import expert_counts
from tests.conversion.dense_models import (
    EVERY_FAMILY,
    NUM_NEURONS,
    VOCAB_SIZE,
    kinds_of,
    labelled_batch,
    logits_of,
    model_inputs,
    random_scores,
    tiny_model,
    token_batch,
)
from tests.conversion.test_importance import assert_same, sample_loop
from tests.measure.test_profile import SEQ_LEN, counted_flops_per_token
from tests.moe.merged import MERGED, draw_gates

EVERYTHING = {"expert_size": NUM_NEURONS, "num_shared_neurons": NUM_NEURONS}
COPIES = {"expert_size": NUM_NEURONS, "num_shared_neurons": 0, "method": "full_copy"}
PER_TOKEN = ("hash_random", "token_gate")

every_family = pytest.mark.parametrize("family", EVERY_FAMILY)
every_generator = pytest.mark.parametrize(
    "family", [name for name in EVERY_FAMILY if hasattr(tiny_model(name), "generate")]
)


def converted(model: Any, *, router: str = "token_gate", seed: int = 1, **changes: Any) -> Any:
    sizes = {"num_experts": 4, "expert_size": 8, "num_shared_neurons": 4}
    plan = plan_partition(random_scores(model), **(sizes | changes))
    if router not in MERGED:
        return dense_to_moe(model, plan, router=router, seed=seed)
    student = dense_to_moe(model, plan, router=router, seed=seed, top_k=2, segment_length=3)
    draw_gates(student, "gate", "noise")
    return student


def padded(model: Any, *, left: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Three texts of different lengths, and the places of their tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(3, 8, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((8, 5, 3)):
        place = slice(8 - length, 8) if left else slice(0, length)
        ids[row, place] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        mask[row, place] = 1
    pad = model.config.pad_token_id
    batch = {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[2, 5, 6], [2, 7, 8], [2, 9, 4]])
    return batch, mask.bool()


def body_states(model: Any, *, left: bool) -> Tensor:
    """What the last layer gives for the real tokens; of a decoder that reads an encoder for all."""
    batch, real = padded(model, left=left)
    with torch.no_grad():
        states = hidden_stacks(model(**batch, output_hidden_states=True), batch)[-1].states[-1]
    return states if model.config.is_encoder_decoder else states[real]


def test_every_row_has_its_tiny_model() -> None:
    found = {tiny_model(family).config.model_type for family in EVERY_FAMILY}
    assert found == set(FAMILIES)


@every_family
def test_scores_are_those_of_the_sample_loop(family: str) -> None:
    model = tiny_model(family)
    batches = [labelled_batch(model, seed=seed) for seed in (7, 8)]
    assert_same(score_importance(model, batches), sample_loop(model, batches))


@every_family
def test_scores_for_answers_are_those_of_the_sample_loop(family: str) -> None:
    if "ForQuestionAnswering" not in kinds_of(family):
        pytest.skip("has no such head")
    model = tiny_model(family, "ForQuestionAnswering")
    batch = token_batch(num_samples=2, length=5)
    batch |= {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 1])}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    scores, expected = score_importance(model, [batch]), sample_loop(model, [batch])
    for score_F, expected_F in zip(scores, expected, strict=True):
        torch.testing.assert_close(
            score_F, expected_F, rtol=1e-4, atol=1e-5 * float(expected_F.max())
        )


@pytest.mark.parametrize("router", [*PER_TOKEN, "sentence_gate", *MERGED])
@every_family
def test_conversion_keeps_the_function(family: str, router: str) -> None:
    model = tiny_model(family)
    batch = token_batch()
    expected = logits_of(model, batch)
    assert float(expected.std()) > 0.1, "a trivial case proves nothing"
    for changes in (EVERYTHING, EVERYTHING | {"tie_shared": True}, COPIES):
        student = converted(model, router=router, **changes)
        torch.testing.assert_close(logits_of(student, batch), expected, rtol=1e-4, atol=1e-5)
    assert [layer.name for layer in moe_layers(student)] == [s.name for s in find_slots(model)]


@every_family
def test_an_expert_is_the_dense_ffn_without_its_other_neurons(family: str) -> None:
    model = tiny_model(family)
    plan = plan_partition(random_scores(model), num_experts=1, expert_size=8, num_shared_neurons=0)
    pruned = copy.deepcopy(model)
    for slot, part in zip(find_slots(pruned), plan.partitions, strict=True):
        gone = torch.ones(NUM_NEURONS, dtype=torch.bool)
        gone[part.expert_ids[0]] = False
        with torch.no_grad():
            slot.weights().w_out[:, gone] = 0.0
    expected = logits_of(pruned, token_batch())
    assert not torch.allclose(expected, logits_of(model, token_batch()), atol=1e-2)
    torch.testing.assert_close(
        logits_of(dense_to_moe(model, plan), token_batch()), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("router", [*PER_TOKEN, *MERGED])
@every_family
def test_tied_and_untied_experts_start_alike(family: str, router: str) -> None:
    model = tiny_model(family)
    untied, tied = (converted(model, router=router, tie_shared=tied) for tied in (False, True))
    one, other = (logits_of(student, token_batch()) for student in (untied, tied))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tie_shared", [True, False])
@every_family
def test_the_fit_comes_closer_to_the_dense_model(family: str, tie_shared: bool) -> None:
    model = tiny_model(family)
    batches = [token_batch(num_samples=16, length=9, seed=seed) for seed in (1, 2)]
    batches = [model_inputs(model, batch) for batch in batches]
    student = converted(model, num_experts=2, tie_shared=tie_shared)

    def missed() -> float:
        """How far the first block's output is off, at real tokens."""
        total = 0.0
        for batch in batches:
            with torch.no_grad():
                mine, wanted = (
                    hidden_stacks(one(**batch, output_hidden_states=True), batch)[0].states[1]
                    for one in (student, model)
                )
            off_BS = (mine - wanted).square().mean(dim=-1)
            total += float(off_BS[batch["attention_mask"].bool()].mean())
        return total

    first = missed()
    fit_outputs(student, model, [batches])
    assert missed() < 0.9 * first


@every_family
def test_stacks_show_their_embeddings_and_layers(family: str) -> None:
    model = tiny_model(family)
    batch = model_inputs(model, token_batch())
    with torch.no_grad():
        stacks = hidden_stacks(model(**batch, output_hidden_states=True), batch)
    assert tuple(len(stack.states) - 1 for stack in stacks) == stack_depths(model)
    assert sum(stack_depths(model)) == len(find_slots(model))


@pytest.mark.parametrize("router", [*PER_TOKEN, "sentence_gate", *MERGED])
@every_family
def test_padding_on_either_side_says_nothing(family: str, router: str) -> None:
    """Where it says nothing to the dense model: BERT's places count from the left, padding too."""
    model = tiny_model(family)
    student = converted(model, router=router)
    whole = converted(model, router=router, **EVERYTHING)
    torch.testing.assert_close(
        body_states(whole, left=True), body_states(model, left=True), rtol=1e-4, atol=1e-5
    )
    left, right = (body_states(model, left=left) for left in (True, False))
    is_indifferent = torch.allclose(left, right, atol=1e-4)
    assert is_indifferent == (family not in ABSOLUTE_PLACES)
    if is_indifferent:
        left, right = (body_states(student, left=left) for left in (True, False))
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


ABSOLUTE_PLACES = ("bert", "electra", "distilbert", "gpt2", "bart")


@pytest.mark.parametrize("pad_token_id", [0, 1, 5])
@every_family
def test_texts_may_be_as_long_as_there_are_positions(family: str, pad_token_id: int) -> None:
    model = tiny_model(family, pad_token_id=pad_token_id)
    limit = position_limit(model)
    if limit is None:
        pytest.skip("sees distances alone, and has no limit")
    has_table = any(
        isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        for name, module in model.named_modules()
    )

    def answer(length: int) -> Tensor:
        ids = torch.full((2, length), VOCAB_SIZE - 1)
        return logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    assert answer(limit).isfinite().all()
    # Rotated and relative places go on, untrained.
    assert has_table or family not in ABSOLUTE_PLACES
    if has_table:
        with pytest.raises((IndexError, RuntimeError)):
            answer(limit + 1)


def test_models_that_write_count_their_places_from_zero() -> None:
    """`tasks` reads the places of these from the configuration, since it knows no families."""
    for spec in FAMILIES.values():
        writes = [head for head in spec.heads if head.endswith(WRITERS)]
        assert spec.pad_position is None or not writes


WRITERS = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")


@every_family
def test_flops_agree_with_what_torch_counts(family: str) -> None:
    # Eager attention consists of matrix products, which the counter knows; it follows gradients.
    model = tiny_model(family, attn_implementation="eager").requires_grad_(False)
    for one in (model, converted(model, router="hash_random").requires_grad_(False)):
        counted = counted_flops_per_token(one)
        assert flops_per_token(one, SEQ_LEN).total == pytest.approx(counted, rel=0.02)


@every_family
def test_a_skeleton_counts_like_a_model(family: str) -> None:
    for kind in kinds_of(family):
        model = tiny_model(family, kind)
        with torch.device("meta"):
            skeleton = type(model)(model.config).eval()
        students = [converted(one, tie_shared=True) for one in (model, skeleton)]
        assert all(value.is_meta for value in students[1].parameters())
        for count in (count_parameters, lambda one: flops_per_token(one, SEQ_LEN)):
            assert len({count(student) for student in students}) == 1, kind


@every_family
def test_padding_is_left_out_of_the_record(family: str) -> None:
    student = converted(tiny_model(family))
    batch, real = padded(student, left=False)
    with torch.no_grad(), record_routing() as record:
        student(**batch)
    counts = [int(count_E.sum()) for count_E in expert_counts(record).values()]
    num_read, num_written = int(real.sum()), batch.get("decoder_input_ids", real).numel()
    expected = [
        num_written if slot.in_decoder else num_read for slot in find_slots(tiny_model(family))
    ]
    assert counts == expected


@pytest.mark.parametrize("router", [*PER_TOKEN, "merged_token"])
@every_family
def test_gradient_checkpointing_changes_nothing(family: str, router: str) -> None:
    model = tiny_model(family)
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers recomputes nothing of it")
    batch = labelled_batch(model)
    gradients = []
    for checkpointing in (False, True):
        student = converted(model, router=router).train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        torch.manual_seed(0)  # recomputation draws the same dropout and noise again
        with record_routing() as record:
            student(**batch).loss.backward()
        names = [entry.name for entry in record.entries]
        num_gates = len(linear_names(find_slots(model)[0].gated)) if router in MERGED else 1
        assert len(names) == len(set(names)) == num_gates * len(moe_layers(student)), (
            "none is recorded twice"
        )
        gradients.append([value.grad for value in student.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@every_family
def test_half_precision(family: str) -> None:
    model = tiny_model(family)
    expected = logits_of(converted(model, router="hash_random"), token_batch())
    student = converted(model.to(torch.bfloat16), router="hash_random")
    assert {value.dtype for value in student.parameters()} == {torch.bfloat16}
    found = logits_of(copy.deepcopy(student), token_batch())
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).abs().mean()) < 0.1 * float(expected.std())


@pytest.mark.parametrize("router", [*PER_TOKEN, "merged_sequence"])
@every_generator
def test_generation_with_a_cache_equals_generation_without(family: str, router: str) -> None:
    model = tiny_model(family)
    batch, _ = padded(model, left=True)
    batch.pop("decoder_input_ids", None)
    student = converted(model, router=router)
    for options in ({"num_beams": 1}, {"num_beams": 2}):
        asked: dict[str, Any] = options | {"max_new_tokens": 6, "do_sample": False}
        with_cache = student.generate(**batch, **asked, use_cache=True)
        without = student.generate(**batch, **asked, use_cache=False)
        assert with_cache.shape[1] > 2
        assert torch.equal(with_cache, without)


@every_generator
def test_a_sentence_gate_in_a_decoder_sees_no_later_token(family: str) -> None:
    student = converted(tiny_model(family), router="sentence_gate")
    ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 5:] = 4
    name = "decoder_input_ids" if student.config.is_encoder_decoder else "input_ids"
    with torch.no_grad():
        first, second = (student(**({"input_ids": ids} | {name: one})) for one in (ids, changed))
    torch.testing.assert_close(first.logits[:, :5], second.logits[:, :5])
    asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert student.generate(input_ids=ids, **asked, use_cache=False).shape[1] > 1
    with pytest.raises(MissingInputError, match="use_cache=False"):
        student.generate(input_ids=ids, **asked)
