"""The native encoder leaves padding out: nothing else changes, and padding costs nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conversion.dense_models import VOCAB_SIZE, tiny_model
from tests.inference.native_forms import (
    LIMITS,
    error,
    every_precision,
    native_blocks,
    needs_native,
    prepare,
    threads,
)
from tests.inference.test_backends import routed
from tests.inference.test_encoder import spread_choices, wide

NEAR = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.05}
"""How far a text's answer may lie from that in other company: blocks of attention differ."""


def mask_of(kind: str, num_texts: int, num_tokens: int) -> Tensor:
    """Which tokens are no padding, (B, L) int64; each text has one at least."""
    drawn = torch.Generator().manual_seed(num_texts * 1000 + num_tokens)
    lengths = torch.randint(1, num_tokens + 1, (num_texts, 1), generator=drawn)
    places = torch.arange(num_tokens).expand(num_texts, -1)
    if kind == "on the right":
        return (places < lengths).long()
    if kind == "on the left":
        return (places >= num_tokens - lengths).long()
    if kind == "the same for all":
        return (places < lengths[0]).long()
    holes = torch.rand(num_texts, num_tokens, generator=drawn) < 0.5
    holes[:, 0] = True
    return holes.long()


@every_precision
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", ["on the right", "on the left", "the same for all", "between"])
def test_padding_of_any_kind(kind: str, num_threads: int, precision: str) -> None:
    """Texts that one thread takes together, and so few that threads share their heads."""
    models = [wide(), routed("bert", router="hash_random", top_k=2)]
    leans = [prepare(model, precision) for model in models]
    with threads(num_threads):
        for num_texts, num_tokens in ((1, 9), (2, 33), (5, 70), (41, 13)):
            mask = mask_of(kind, num_texts, num_tokens)
            for model, lean in zip(models, leans, strict=True):
                longest = model.config.max_position_embeddings
                if num_tokens > longest:
                    continue
                ids = torch.randint(3, VOCAB_SIZE, (num_texts, num_tokens))
                assert error(model, lean, input_ids=ids, attention_mask=mask) < LIMITS[precision]
                with torch.no_grad():
                    found = lean.base_model(input_ids=ids, attention_mask=mask)[0]
                # A head may read what lies at the first place, so it is never left out.
                assert mask[:, 0].all() != found[mask == 0].any() or mask.all()


@needs_native
@pytest.mark.parametrize("router", ["token_gate", "sentence_gate", "task_gate", "hash_random"])
def test_routers_see_the_same_tokens(router: str) -> None:
    model = routed("bert", router=router, top_k=2, num_tasks=1)
    spread_choices(model)
    lean = prepare(model)
    mask = mask_of("between", 6, 12)
    ids = torch.randint(3, VOCAB_SIZE, (6, 12))
    assert error(model, lean, input_ids=ids, attention_mask=mask) < 1e-5


@every_precision
@pytest.mark.parametrize("longest", [40, 514])
def test_each_text_answers_as_it_does_alone(longest: int, precision: str) -> None:
    """Attention of our own, and torch's for texts that are too long for it."""
    model = tiny_model("bert", max_position_embeddings=520).eval()
    lean = prepare(model, precision)
    lengths = [1, longest, 7, 32, 33, *[5] * 9]
    ids = torch.randint(3, VOCAB_SIZE, (len(lengths), longest))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        together = lean(input_ids=ids, attention_mask=mask).logits
        for text, length in enumerate(lengths):
            alone = lean(input_ids=ids[text : text + 1, :length]).logits
            assert float((together[text] - alone[0]).abs().max()) < NEAR[precision]


@every_precision
def test_heads_answer_whatever_is_padding(precision: str) -> None:
    """On the left the pooler of BERT reads padding, as the eager model does."""
    model = tiny_model("bert")
    lean = prepare(model, precision)
    for kind in ("on the right", "on the left", "between"):
        mask = mask_of(kind, 5, 9)
        ids = torch.randint(3, VOCAB_SIZE, (5, 9))
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
            found = lean(input_ids=ids, attention_mask=mask).logits
        assert float((found.float() - expected).abs().max()) < NEAR[precision]


@every_precision
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_text_that_is_no_number_reaches_no_other(num_threads: int, precision: str) -> None:
    """Memory of attention is used again for texts of other lengths."""
    encoder = native_blocks(prepare(wide(), precision))._encoder
    lengths = [33, 9, 70, 1, 34]
    mask = (torch.arange(70) < torch.tensor(lengths)[:, None])[:, None, None, :]
    hidden = torch.randn(5, 70, 60)
    with threads(num_threads):
        expected = encoder.forward(hidden, mask, None, [], [])
        hidden[0] = float("nan")
        hidden[3, 1:] = float("inf")  # padding
        found = encoder.forward(hidden, mask, None, [], [])
    assert found[0, :33].isnan().all()
    assert not found[3, 1:].any()
    assert torch.equal(found[1:], expected[1:])


@every_precision
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_that_say_more_than_what_is_padding_are_used_whole(
    dtype: torch.dtype, precision: str
) -> None:
    """Texts without a first token, or any; tokens that see others than their neighbours; a bias."""
    encoder = native_blocks(prepare(wide(), precision))._encoder
    hidden = torch.randn(2, 12, 60)
    keys = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    keys[0, ..., 7:] = False
    blocks = keys.expand(-1, -1, 12, -1).clone()
    blocks[1, :, :6, 6:] = False
    nothing, later = keys.clone(), keys.clone()
    nothing[1] = False
    later[1, ..., 0] = False

    def forward(seen: Tensor) -> Tensor:
        lowest = torch.finfo(dtype).min if dtype != torch.bool else 0
        mask = seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype)
        mask = mask if dtype == torch.bool else mask.masked_fill(~seen, lowest)
        out: Tensor = encoder.forward(hidden, mask, None, [], [])
        return out

    plain = forward(keys)
    assert not plain[0, 7:].any()
    by_query = forward(keys.expand(-1, -1, 12, -1).clone())
    assert torch.equal(by_query, plain)
    for whole in (forward(blocks), forward(nothing), forward(later)):
        assert whole.abs().amax(-1).gt(0).all()  # padding too
        assert torch.allclose(whole[0, :7], plain[0, :7], atol=NEAR[precision])
    assert not torch.allclose(forward(blocks)[1], plain[1], atol=NEAR[precision])
    if dtype != torch.bool:
        biased = torch.zeros(2, 1, 1, 12, dtype=dtype).masked_fill(~keys, -4.0)
        assert encoder.forward(hidden, biased, None, [], [])[0, 7:].abs().amax(-1).gt(0).all()
