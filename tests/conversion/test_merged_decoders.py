"""Merged experts in decoders: with a key-value cache the logits are those of a whole pass."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.errors import MissingInputError
from moe_dist.moe import kept_merges
from tests.conversion.dense_models import VOCAB_SIZE, random_scores, tiny_model
from tests.moe.merged import MERGED, draw_gates

SIZES: dict[str, Any] = {"num_experts": 4, "expert_size": 8, "num_shared_neurons": 4}
LENGTH = 3
DECODERS = ("gpt2", "llama", "t5", "bart")
SEGMENTED = tuple(name for name in MERGED if name != "merged_task")

every_decoder = pytest.mark.parametrize("family", DECODERS)


def student_of(family: str, router: str = "merged_sequence") -> Any:
    model = tiny_model(family)
    if not hasattr(model, "generate"):
        pytest.skip("does not write")
    student = dense_to_moe(
        model,
        plan_partition(random_scores(model), **SIZES),
        router=router,
        top_k=2,
        segment_length=LENGTH,
    )
    draw_gates(student)
    return student.eval()


def sequences(num: int = 3, length: int = 11) -> tuple[Tensor, Tensor]:
    """Texts padded on the left to different lengths, which segments do not begin together."""
    ids = torch.randint(3, VOCAB_SIZE, (num, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 7)[:num]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def run(student: Any, ids: Tensor, mask: Tensor, **given: Any) -> Any:
    """Give logits of the last columns; an encoder-decoder reads the first ones all the time."""
    if student.config.is_encoder_decoder:
        source = sequences(len(ids))[0][:, :4]
        names = {"input_ids": source, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    else:
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        names = {"input_ids": ids, "attention_mask": mask}
        names["position_ids"] = places[:, -ids.shape[1] :]
    with torch.no_grad():
        return student(**{**names, **given})


def by_steps(student: Any, ids: Tensor, mask: Tensor, parts: list[int], cache: Any = None) -> Any:
    """Feed the columns in parts; gives all logits and the cache."""
    found, start = [], mask.shape[1] - ids.shape[1]
    for size in parts:
        stop = start + size
        offset = mask.shape[1] - ids.shape[1]
        own = ids[:, start - offset : stop - offset]
        out = run(student, own, mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
        start = stop
    return torch.cat(found, dim=1), cache


def assert_close(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", MERGED)
@pytest.mark.parametrize("num", [1, 3])
@every_decoder
def test_step_by_step_gives_the_logits_of_the_whole(family: str, num: int, router: str) -> None:
    student = student_of(family, router)
    ids, mask = sequences(num)
    expected = run(student, ids, mask, use_cache=False).logits
    for parts in ([1] * 11, [6, 1, 1, 1, 1, 1], [4, 7]):
        found, _ = by_steps(student, ids, mask, parts)
        assert_close(found, expected, mask)


@pytest.mark.parametrize(("router", "num_merges"), [("merged_task", 1), ("merged_sequence", 3)])
def test_steps_of_a_segment_share_a_merge(
    router: str, num_merges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of("llama", router)
    merged = []
    original = kept_merges.stacked_merges

    def count(*given: Any) -> Any:
        merged.append(1)
        return original(*given)

    monkeypatch.setattr(kept_merges, "stacked_merges", count)
    ids, mask = sequences(1)
    _, cache = by_steps(student, ids, mask, [3, *[1] * 8])
    # Steps 3 to 5, 6 to 8, 9 and 10 are each in one segment; all are of one task.
    num_layers = student.config.num_hidden_layers
    assert len(merged) == num_merges * num_layers
    for one in cache.kept_merges.values():
        assert one.weights is not None
        assert all(len(value) == 1 for value in one.weights.values())
    _, cache = by_steps(student, *sequences(3), [1] * 11)
    for one in cache.kept_merges.values():
        # Else the experts themselves are no more to read.
        assert len(next(iter(one.weights.values()))) < 4 if one.weights else True


@every_decoder
def test_the_gates_matter(family: str) -> None:
    """Else the other tests would pass whatever the cache carries."""
    student = student_of(family)
    ids, mask = sequences()
    _, cache = by_steps(student, ids[:, :8], mask[:, :8], [8])
    _, same = by_steps(student, ids[:, :8], mask[:, :8], [8])
    own = getattr(same, "self_attention_cache", same)
    own.segment_states = {
        name: state.on_batch(lambda value: value.flip(0))
        for name, state in own.segment_states.items()
    }
    found, wrong = (by_steps(student, ids[:, 8:], mask, [1, 1, 1], one)[0] for one in (cache, same))
    assert float((found - wrong).abs().max()) > 1e-3


@pytest.mark.parametrize("router", SEGMENTED)
@every_decoder
def test_a_cropped_cache_goes_on(family: str, router: str) -> None:
    student = student_of(family, router)
    ids, mask = sequences()
    expected = run(student, ids, mask, use_cache=False).logits
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 5) % VOCAB_SIZE
    _, cache = by_steps(student, other, mask, [8, 1])
    cache.crop(-3)
    found, _ = by_steps(student, ids[:, 6:], mask, [2, 1, 1, 1], cache)
    assert_close(found, expected[:, 6:], mask[:, 6:])


@every_decoder
def test_what_a_gate_no_longer_holds_cannot_be_cropped(family: str) -> None:
    student = student_of(family)
    ids, mask = sequences()
    _, cache = by_steps(student, ids, mask, [11])
    with pytest.raises(MissingInputError, match="cannot forget 5 tokens"):
        cache.crop(-5)
    assert cache.get_seq_length() == 11, "it is left whole"
    cache.reset()
    expected = run(student, ids, mask, use_cache=False).logits
    assert_close(by_steps(student, ids, mask, [11], copy.deepcopy(cache))[0], expected, mask)


@every_decoder
def test_sequences_of_a_cache_are_reordered_selected_and_repeated(family: str) -> None:
    student = student_of(family)
    ids, mask = sequences()
    expected = run(student, ids, mask, use_cache=False).logits
    order = torch.tensor([2, 0, 2])
    if student.config.is_encoder_decoder:
        order = torch.tensor([0, 1, 2])  # the sources of `run` stay where they are

    def begun() -> Any:
        return by_steps(student, ids[:, :7], mask[:, :7], [5, 1, 1])[1]

    def assert_goes_on(cache: Any, rows: Tensor) -> None:
        found, _ = by_steps(student, ids[rows][:, 7:], mask[rows], [1, 1, 2], cache)
        assert_close(found, expected[rows][:, 7:], mask[rows][:, 7:])

    reordered = begun()
    reordered.reorder_cache(order)
    assert_goes_on(reordered, order)
    selected = copy.deepcopy(begun())
    selected.batch_select_indices(torch.tensor([0, 1]))
    assert_goes_on(selected, torch.tensor([0, 1]))
    if not student.config.is_encoder_decoder:
        repeated = begun()
        repeated.batch_repeat_interleave(2)
        assert_goes_on(repeated, torch.tensor([0, 0, 1, 1, 2, 2]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@every_decoder
def test_a_cache_can_be_copied_and_pickled(family: str, copied: Callable[[Any], Any]) -> None:
    student = student_of(family)
    ids, mask = sequences()
    expected = run(student, ids, mask, use_cache=False).logits
    _, cache = by_steps(student, ids[:, :7], mask[:, :7], [5, 1, 1])
    twin = copied(cache)
    assert type(twin) is type(cache)
    for one in (twin, copied(twin), cache):
        found, _ = by_steps(student, ids[:, 7:], mask, [1, 1, 2], one)
        assert_close(found, expected[:, 7:], mask[:, 7:])
    twin.crop(-3)
    found, _ = by_steps(student, ids[:, 8:], mask, [3], twin)
    assert_close(found, expected[:, 8:], mask[:, 8:])


@every_decoder
def test_a_mask_of_queries_by_keys_gives_what_one_of_columns_gives(family: str) -> None:
    student = student_of(family)
    ids, mask = sequences()
    expected = run(student, ids, mask, use_cache=False).logits
    seen = torch.ones(11, 11, dtype=torch.bool).tril() & mask.bool().unsqueeze(1)
    name = "decoder_attention_mask" if student.config.is_encoder_decoder else "attention_mask"
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for given in (seen.unsqueeze(1), added.unsqueeze(1)):
        found = run(student, ids, mask, use_cache=False, **{name: given}).logits
        assert_close(found, expected, mask)
    packed = torch.block_diag(torch.ones(5, 5), torch.ones(6, 6)).bool() & seen[:1]
    with pytest.raises(MissingInputError, match="that is no causal mask"):
        run(student, ids, mask, use_cache=False, **{name: packed.expand(3, 1, -1, -1)})


@every_decoder
def test_a_cache_that_carries_nothing_is_refused(family: str) -> None:
    student, dense = student_of(family), tiny_model(family).eval()
    ids, mask = sequences()
    _, cache = by_steps(dense, ids[:, :7], mask[:, :7], [7])
    with pytest.raises(MissingInputError, match="carries nothing of it"):
        by_steps(student, ids[:, 7:], mask, [1], cache)
    _, cache = by_steps(student, ids[:, :7], mask[:, :7], [7])
    own = getattr(cache, "self_attention_cache", cache)
    for layer in own.layers:
        layer.crop(-2)
    with pytest.raises(MissingInputError, match=r"has seen 7 tokens, and .* holds 5"):
        by_steps(student, ids[:, 5:], mask, [1], cache)


@pytest.mark.parametrize(("router", "num_beams"), [("merged_sequence", 1), ("merged_token", 3)])
@every_decoder
def test_generation_with_a_cache_equals_generation_without(
    family: str, router: str, num_beams: int
) -> None:
    student = student_of(family, router)
    ids, mask = sequences(length=8)
    asked: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "do_sample": False,
        "num_beams": num_beams,
    }
    with_cache = student.generate(**asked, use_cache=True)
    without = student.generate(**asked, use_cache=False)
    assert with_cache.shape[1] >= 9
    assert torch.equal(with_cache, without)
    static = student.generate(**asked, cache_implementation="static")
    assert torch.equal(static, without)


def test_an_assistants_guesses_are_taken_back() -> None:
    """Speculative decoding crops the cache by what it guessed wrong."""
    student, assistant = student_of("llama"), tiny_model("llama", hidden_size=8).eval()
    ids, _ = sequences(1)
    asked: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    expected = student.generate(**asked)
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assert torch.equal(student.generate(**asked, assistant_model=assistant), expected)


@every_decoder
@pytest.mark.parametrize("router", SEGMENTED)
def test_half_precision_stays_near(family: str, router: str) -> None:
    student = student_of(family, router)
    ids, mask = sequences()
    expected = run(student, ids, mask, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = run(student, ids, mask, use_cache=False).logits.float()
    # Rounding may choose another expert where two are nearly alike, so most are near and not all.
    gaps = (found - expected)[mask.bool()].abs()
    assert float(gaps.quantile(0.9)) < 0.1
