"""What a native decoder does with inputs, caches and models that are not as usual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaModel
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.errors import ConversionError
from moe_dist.inference.backends import Form, decoder_call
from tests.conversion.dense_models import random_scores, tiny_model
from tests.inference.native_forms import (
    error,
    every_precision,
    native_blocks,
    needs_native,
    prepare,
)
from tests.inference.test_backends import routed
from tests.inference.test_decoder import LIMITS, texts, wide


def of_many_experts(top_k: int) -> Any:
    model = wide()
    plan = plan_partition(
        random_scores(model),
        num_experts=16,
        expert_size=8,
        num_shared_neurons=0,
        method="importance",
    )
    return dense_to_moe(model, plan, router="token_gate", top_k=top_k).eval()


@every_precision
@pytest.mark.parametrize("top_k", [5, 8])
def test_tokens_that_are_no_numbers(top_k: int, precision: str) -> None:
    """Their experts are distinct all the same: none gets more rows than there are tokens."""
    lean = prepare(of_many_experts(top_k), precision)
    embedded = torch.randn(1, 16, 60)
    with torch.no_grad():
        sound = lean(inputs_embeds=embedded).logits
        embedded[:, 5:] = float("nan")
        found = lean(inputs_embeds=embedded).logits
        assert found[:, 5:].isnan().all()
        difference = (found[:, :5] - sound[:, :5]).abs().max()
        assert difference < LIMITS[precision] * sound[:, :5].abs().max()
        for num_tokens in (16, 20):
            nothing = torch.full((1, num_tokens, 60), float("nan"))
            assert lean(inputs_embeds=nothing).logits.isnan().all()


@every_precision
def test_an_expert_may_be_named_twice(precision: str) -> None:
    """As the halves of a layer do it, which split rows by themselves."""
    decoder = native_blocks(prepare(of_many_experts(top_k=8), precision))._decoder
    hidden, table = torch.randn(1, 16, 60), torch.randn(16, 20)
    places: tuple[Any, ...] = (table, table, torch.arange(16).unsqueeze(0), None, [], [], 0)
    ids, weights = torch.full((16, 8), 3), torch.rand(16, 8)
    ids[::4, 0] = 15
    found = decoder.forward(hidden, *places, [ids] * 2, [weights] * 2)
    now = hidden
    for index in range(2):
        now, normed = decoder.attention_half(index, now, *places)
        now = decoder.feed_forward_half(index, now, normed, ids, weights)
    expected = decoder.last_norm(now, hidden)
    assert (found - expected).abs().max() < LIMITS[precision] * expected.abs().max()


@needs_native
def test_all_layers_of_a_cache_have_one_length() -> None:
    model = tiny_model("llama")
    lean, smaller = prepare(model), tiny_model("llama", num_hidden_layers=1)
    ids = texts(1, 9)
    of_fewer, cut = DynamicCache(), DynamicCache()
    smaller(input_ids=ids, past_key_values=of_fewer)
    lean(input_ids=ids, past_key_values=cut)
    cut.layers[1].crop(-5)
    for cache, said in ((of_fewer, "0, 9"), (cut, "4, 9")):
        before = [layer.get_seq_length() for layer in cache.layers]
        with pytest.raises(ConversionError, match=f"different numbers of tokens: {said}"):
            lean(input_ids=ids[:, :1], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == before


class _Stack(LlamaModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = 3 * out.last_hidden_state
        return out


class _Rotary(LlamaRotaryEmbedding):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return super().forward(x, position_ids + 2 * (position_ids > 3))


class _OwnRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(hidden_states)


def test_a_stack_of_another_class_keeps_its_blocks() -> None:
    stacked, turned, normed = (tiny_model("llama").eval() for _ in range(3))
    stacked.model.__class__ = _Stack
    turned.model.rotary_emb.__class__ = _Rotary
    normed.model.norm.__class__ = _OwnRMSNorm
    for model, name in ((stacked, "_Stack"), (turned, "_Rotary"), (normed, "_OwnRMSNorm")):
        with pytest.raises(ConversionError, match=f"it has a {name}, which is not its family's"):
            Form("lean", "int8").prepare(model)
        assert error(model, Form("lean").prepare(model), input_ids=texts(2, 7)) < 1e-5


@needs_native
def test_some_biases_may_be_missing() -> None:
    for missing in ("q_proj", "k_proj", "v_proj"):
        model = wide(attention_bias=True)
        for block in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                torch.nn.init.normal_(getattr(block.self_attn, name).bias)
            getattr(block.self_attn, missing).bias = None
        assert error(model, prepare(model), input_ids=texts(2, 9)) < 1e-5


@needs_native
def test_as_many_layers_as_the_configuration_says() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    model.config.num_hidden_layers = 2
    lean = prepare(model)
    assert error(model, lean, input_ids=texts(2, 9)) < 1e-5
    cache = DynamicCache()
    lean(input_ids=texts(2, 9), past_key_values=cache)
    assert len(cache.layers) == 2


@needs_native
def test_positions_of_any_size_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    lean = prepare(model)
    computed = []
    compute = decoder_call._Places._compute

    def count(self: Any, positions: torch.Tensor) -> Any:
        computed.append(positions.numel())
        return compute(self, positions)

    monkeypatch.setattr(decoder_call._Places, "_compute", count)
    ids = texts(2, 12)
    places = torch.arange(12).unsqueeze(0)
    for positions in (places.int(), places + 5_000_000, places + 100, places.repeat(2, 1) + 300):
        assert error(model, lean, input_ids=ids, position_ids=positions) < 1e-4
    assert max(computed) <= 256
    with pytest.raises(ConversionError, match="takes no positions below 0"):
        lean(input_ids=ids, position_ids=places - 3)


@needs_native
def test_another_default_type_changes_nothing() -> None:
    model = routed("llama", router="token_gate")
    ids = texts(2, 9)
    expected = prepare(model)(input_ids=ids).logits
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = prepare(model)(input_ids=ids).logits
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_embeddings_of_a_prepared_model_cannot_be_resized(family: str) -> None:
    lean = Form("lean").prepare(tiny_model(family).eval())
    with pytest.raises(ConversionError, match="lean form cannot have its embeddings resized"):
        lean.resize_token_embeddings(130)
