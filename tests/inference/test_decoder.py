"""The native decoder answers and writes as the blocks that it stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaMLP

from moe_dist.conversion import dense_to_moe
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference.backends import Form
from moe_dist.inference.backends.decoder import LLAMA_KIND
from moe_dist.inference.backends.native_linear import NativeLinear
from moe_dist.inference.backends.packed_linear import PackedLinear
from moe_dist.moe.routing import RoutingContext, use_context
from tests.conversion.dense_models import VOCAB_SIZE, tiny_model, token_batch
from tests.inference.native_forms import (
    error,
    every_precision,
    is_native,
    native_blocks,
    needs_native,
    odd_plan,
    prepare,
    threads,
)
from tests.inference.test_backends import routed

LIMITS = {"fp32": 1e-5, "bf16": 0.08, "int8": 0.15}
"""As of encoders, but what rounding leaves is multiplied by gates, and no norm follows it."""
every_family = pytest.mark.parametrize("family", LLAMA_KIND)


def wide(family: str = "llama", **options: Any) -> Any:
    """Widths that are no multiples of a block: six heads of 20 for two keys, 130 neurons."""
    sizes = {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 20, "intermediate_size": 130}
    return tiny_model(family, **sizes, max_position_embeddings=200, **options).eval()


def texts(num_texts: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_texts * 100 + length)
    return torch.randint(3, VOCAB_SIZE, (num_texts, length), generator=generator)


def padded(ids: torch.Tensor, *, left: bool) -> dict[str, torch.Tensor]:
    """Texts of different lengths, filled up on one side."""
    mask = torch.ones_like(ids)
    for text in range(1, len(ids)):
        hidden = 2 * text
        mask[text, slice(0, hidden) if left else slice(-hidden, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def written(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    settings = {"max_new_tokens": 12, "do_sample": False} | options
    tokens: torch.Tensor = model.generate(**inputs, **settings)
    return tokens


@every_precision
@every_family
def test_every_family_and_router(family: str, precision: str) -> None:
    # A gate may choose otherwise where two experts score alike, so that is asked in float32.
    gates = ["token_gate", "sentence_gate"] * (precision == "fp32")
    for router in ("", "hash_random", *gates):
        model = routed(family, router=router) if router else tiny_model(family)
        lean = prepare(model, precision)
        for num_texts, length in ((1, 2), (4, 4), (4, 7), (3, 20)):
            inputs = token_batch(num_texts, length)
            assert error(model, lean, **inputs) < LIMITS[precision]


@every_precision
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 9, 16, 17, 65, 130])
def test_any_widths_and_numbers_of_tokens(
    num_tokens: int, num_threads: int, precision: str
) -> None:
    model = wide()
    lean = prepare(model, precision)
    with threads(num_threads):
        for num_texts in (1, 3):
            ids = texts(num_texts, num_tokens)
            assert error(model, lean, input_ids=ids) < LIMITS[precision]


@every_precision
@pytest.mark.parametrize("num_shared", [0, 32])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_of_widths_that_need_filling_up(
    top_k: int, num_shared: int, precision: str
) -> None:
    """41 neurons are no multiple of four."""
    model = wide()
    plan = odd_plan(model, num_shared)
    for router in ("hash_random", *["token_gate"] * (precision == "fp32")):
        student = dense_to_moe(model, plan, router=router, top_k=top_k).eval()
        lean = prepare(student, precision)
        for num_texts, length in ((1, 1), (3, 4), (2, 70)):
            ids = texts(num_texts, length)
            assert error(student, lean, input_ids=ids) < LIMITS[precision]


@needs_native
def test_every_kind_of_choice() -> None:
    """Scaled by probability, of one expert without a router, by the task."""
    for options in (
        {"router": "token_gate", "gate_scale": "probability"},
        {"num_experts": 1, "num_shared": 0, "tie_shared": False},
        {"router": "hash_balanced"},
        {"router": "task_gate", "num_tasks": 3},
        {"router": "task_gate", "num_tasks": 3, "task_map": "fixed"},
    ):
        model = routed("llama", **options)
        lean = prepare(model)
        with use_context(RoutingContext(task_ids=torch.tensor([0, 2, 1, 2]))):
            for length in (2, 9):
                assert error(model, lean, **token_batch(4, length)) < 1e-5


@needs_native
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@every_family
def test_padding_on_both_sides(family: str, left: bool) -> None:
    model = routed(family, router="token_gate")
    lean = prepare(model)
    for length in (4, 9, 19):  # all tokens of a call in one go, and one layer after the other
        inputs = padded(texts(2 if length == 4 else 3, length), left=left)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert error(model, lean, **inputs) < 1e-5
        assert error(model, lean, **inputs, position_ids=positions) < 1e-5


@needs_native
@every_family
def test_a_model_writes_alike(family: str) -> None:
    """Greedily, drawn, with beams, of filled-up texts, and without a cache."""
    for router in ("", "token_gate", "hash_random"):
        model = routed(family, router=router) if router else tiny_model(family)
        lean = prepare(model)
        for inputs in ({"input_ids": texts(1, 5)}, padded(texts(3, 9), left=True)):
            for options in (
                {},
                {"do_sample": True},
                {"num_beams": 3},
                {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
                {"use_cache": False},
                {"repetition_penalty": 1.3, "num_return_sequences": 1},
            ):
                expected = written(model, inputs, **options)
                assert torch.equal(written(lean, inputs, **options), expected), options


@every_precision
def test_a_cache_changes_nothing(precision: str) -> None:
    """Steps give what one pass over all gives; an int8 row knows of no other."""
    model = routed("llama", router="hash_random")
    lean = prepare(model, precision)
    ids = texts(2, 90)
    with torch.no_grad():
        whole = lean(input_ids=ids).logits
        cache = DynamicCache()
        parts = [
            lean(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split([40, 1, 1, 3, 20, 1, 24], dim=1)
        ]
    assert cache.get_seq_length() == 90
    limit = 1e-5 if precision == "fp32" else LIMITS[precision]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < limit * whole.abs().max()


@needs_native
@pytest.mark.parametrize("window", [2, 3, 8, 64])
def test_windows(window: int) -> None:
    """In all layers, and in some; shorter and longer than texts and prompts."""
    mistral = tiny_model("mistral", sliding_window=window)
    qwen = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    for model in (mistral, tiny_model("qwen2", **qwen), tiny_model("qwen3", **qwen)):
        lean = prepare(model)
        for inputs in ({"input_ids": texts(2, 7)}, padded(texts(3, 20), left=False)):
            assert error(model, lean, **inputs) < 1e-5
        inputs = padded(texts(3, 9), left=True)
        assert torch.equal(written(lean, inputs), written(model, inputs))


@needs_native
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 3.0],
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_of_every_kind(rope: dict[str, Any]) -> None:
    model = tiny_model("llama", rope_parameters={"rope_theta": 1e4, **rope})
    lean = prepare(model)
    for length in (5, 40):  # up to 24 is what the model was made for
        assert error(model, lean, input_ids=texts(2, length)) < 1e-5
    inputs = {"input_ids": texts(1, 10)}
    assert torch.equal(
        written(lean, inputs, max_new_tokens=30), written(model, inputs, max_new_tokens=30)
    )


@needs_native
def test_biases_where_a_family_may_have_them() -> None:
    model = wide("llama", attention_bias=True)
    assert error(model, prepare(model), input_ids=texts(2, 20)) < 1e-5


@needs_native
@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_every_head(kind: str) -> None:
    model = tiny_model("llama", kind)
    lean = prepare(model)
    inputs = token_batch()
    with torch.no_grad():
        expected, found = model(**inputs)[0], lean(**inputs)[0]
    real = inputs["attention_mask"].bool() if expected.shape[:2] == (4, 7) else slice(None)
    assert torch.allclose(found[real], expected[real], atol=1e-4)
    with torch.no_grad():
        assert isinstance(lean(**inputs, return_dict=False), tuple)


@needs_native
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_for_pairs_of_tokens(attention: str) -> None:
    model = wide(attn_implementation=attention)
    pairs = torch.ones(3, 1, 18, 18).tril().bool()
    pairs[1, :, 9:, :3] = False
    mask = pairs if attention == "sdpa" else torch.zeros(3, 1, 18, 18).masked_fill(~pairs, -1e4)
    assert error(model, prepare(model), input_ids=texts(3, 18), attention_mask=mask) < 1e-5


@needs_native
def test_a_cache_is_one_of_transformers_to_all_others() -> None:
    """Cut, repeated, chosen from, copied, begun by the model itself and handed back to it."""
    model = tiny_model("qwen3")
    lean = prepare(model)
    ids = texts(2, 30)

    def begun(by: Any) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        by(input_ids=ids[:, :20], past_key_values=cache, use_cache=True)
        return cache

    def last(by: Any, cache: DynamicCache, rows: torch.Tensor = ids, first: int = 20) -> Any:
        return by(input_ids=rows[:, first:], past_key_values=cache, use_cache=True).logits[:, -1]

    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        for one, other in ((lean, lean), (model, lean), (lean, model)):
            assert torch.allclose(last(other, begun(one)), expected, atol=1e-4)
        cache = begun(lean)
        kept = cache.layers[1].keys
        copied, before = copy.deepcopy(cache), kept.clone()
        cache.crop(-8)
        assert cache.get_seq_length() == 12
        assert torch.allclose(last(lean, cache, first=12), expected, atol=1e-4)
        assert torch.equal(kept, before)  # what was given away is not written again
        assert torch.allclose(last(lean, copied), expected, atol=1e-4)
        cache = begun(lean)
        cache.batch_repeat_interleave(2)
        twice = last(lean, cache, ids.repeat_interleave(2, dim=0))
        assert torch.allclose(twice, expected.repeat_interleave(2, dim=0), atol=1e-4)
        cache = begun(lean)
        cache.batch_select_indices(torch.tensor([1]))
        assert torch.allclose(last(lean, cache, ids[1:]), expected[1:], atol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.allclose(last(lean, cache, first=0), expected, atol=1e-4)
        keys, values, *_ = next(iter(begun(lean)))
        assert keys.shape == values.shape == (2, 2, 20, 8)


@every_precision
def test_a_text_does_not_depend_on_what_else_is_there(precision: str) -> None:
    lean = prepare(wide(), precision)
    ids = texts(5, 24)
    mask = torch.ones_like(ids)
    mask[1:, 10:] = 0
    with torch.no_grad():
        together = lean(input_ids=ids, attention_mask=mask).logits[1:2, :10]
        alone = lean(input_ids=ids[1:2, :10]).logits
    scale = float(alone.abs().max())
    assert torch.allclose(together, alone, atol=scale * (1e-5 if precision == "fp32" else 0.05))


@needs_native
def test_autocast_changes_nothing() -> None:
    model = wide()
    lean = prepare(model)
    for length in (4, 30):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = lean(input_ids=texts(2, length)).logits
        with torch.no_grad():
            expected = model(input_ids=texts(2, length)).logits
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.skipif(not is_native("int8"), reason="not on this processor")
def test_int8_packs_the_head_too() -> None:
    model = wide(tie_word_embeddings=True)
    lean = prepare(model, "int8")
    assert type(lean.lm_head) is NativeLinear
    with torch.no_grad():
        hidden = lean.model(input_ids=texts(1, 9))[0]
        expected = hidden @ model.lm_head.weight.t()
        found = lean.lm_head(hidden)
    assert 0 < float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


@needs_native
def test_what_the_decoder_does_not_do_is_refused() -> None:
    model = routed("llama", router="token_gate")
    lean = prepare(model)
    ids = texts(2, 6)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ConversionError, match=f"does not keep what {name} asks for"):
            lean(input_ids=ids, **{name: True})
    static = StaticCache(config=model.config, max_cache_len=20)
    offloaded = DynamicCache(offloading=True)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    for options, said in (
        ({"past_key_values": static}, "takes no StaticCache"),
        ({"past_key_values": offloaded}, "takes no DynamicCache that is offloaded"),
        ({"attention_mask": {"full_attention": None}}, "takes no attention mask of dict"),
        ({"attention_mask": torch.ones(2, 6, 6)}, r"takes no attention mask of \(2, 6, 6\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"takes no attention mask of \(2, 5\) for 2 texts"),
        ({"position_ids": positions, "use_cache": False}, "keeps no texts apart"),
        ({"is_causal": False}, "lets tokens see later ones"),
    ):
        with pytest.raises(ConversionError, match=said):
            lean(input_ids=ids, **options)
    with pytest.raises(ConversionError, match="takes no StaticCache"):
        written(lean, {"input_ids": ids}, cache_implementation="static", disable_compile=True)
    window = DynamicCache(config=tiny_model("mistral", sliding_window=3).config)
    tiny_model("mistral", sliding_window=3)(input_ids=ids, past_key_values=window)
    with pytest.raises(ConversionError, match="keeps a window of tokens alone"):
        lean(input_ids=ids, past_key_values=window)
    embedded = torch.randn(2, 6, 16, requires_grad=True)
    with pytest.raises(ConversionError, match="cannot give gradients"):
        lean(inputs_embeds=embedded)
    with pytest.raises(ValueError, match="exactly one of"):
        lean()
    sentence = prepare(routed("llama", router="sentence_gate"))
    with pytest.raises(MissingInputError, match="use_cache=False"):
        written(sentence, {"input_ids": ids})


class _Tripled(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_other_models_keep_their_blocks() -> None:
    hooked, changed, turned, normed = (tiny_model("llama") for _ in range(4))
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    changed.model.layers[0].mlp.__class__ = _Tripled
    turned.model.rotary_emb.register_forward_hook(lambda *_: None)
    normed.model.norm.register_forward_hook(lambda *_: None)
    odd = tiny_model("llama", hidden_size=18, num_attention_heads=2, head_dim=8)
    for model, said in (
        (hooked, "a block has hooks"),
        (changed, "a block holds a _Tripled"),
        (turned, "its positions have hooks"),
        (normed, "norm has hooks"),
        (tiny_model("llama", hidden_act="mish"), "its activation is not known"),
        (odd, "widths of 16, 18 are no multiples of 4"),
    ):
        with pytest.raises(ConversionError, match=said):
            Form("lean", "int8").prepare(model)
        lean = Form("lean").prepare(model.eval())
        assert any(isinstance(module, PackedLinear) for module in lean.model.modules())
        assert error(model, lean, **token_batch()) < 1e-5


@needs_native
def test_wrong_inputs_end_in_an_error() -> None:
    decoder = native_blocks(prepare(routed("llama", router="sentence_gate")))._decoder
    hidden, table = torch.randn(2, 5, 16), torch.randn(5, 4)
    places = torch.arange(5).unsqueeze(0)
    good: dict[str, Any] = {
        "hidden": hidden,
        "cos": table,
        "sin": table,
        "positions": places,
        "mask": None,
        "keys": [],
        "values": [],
        "past": 0,
    }
    decoder.attention_half(0, *good.values())
    buffers = [torch.empty(2, 2, 9, 4) for _ in range(2)]
    for wrong in (
        {"hidden": hidden[..., :8]},
        {"hidden": hidden[0]},
        {"hidden": hidden.long()},
        {"cos": table[:4]},
        {"cos": table[:, :2], "sin": table[:, :2]},
        {"positions": places + 1},
        {"positions": places - 1},
        {"positions": places.int()},
        {"positions": places[:, :4]},
        {"mask": torch.ones(2, 4)},
        {"mask": torch.ones(2, 1, 5, 5).long()},
        {"past": 1},
        {"past": -1},
        {"keys": buffers, "values": buffers[:1]},
        {"keys": buffers, "values": buffers, "past": 5},
        {"keys": [one.double() for one in buffers], "values": buffers},
    ):
        with pytest.raises((RuntimeError, IndexError)):
            decoder.attention_half(0, *(good | wrong).values())
    with pytest.raises(RuntimeError, match="several experts, and no ids"):
        decoder.forward(*good.values(), [], [])
    ids = torch.zeros(10, 1, dtype=torch.int64)
    for chosen in ([ids], [ids - 1, ids], [ids + 4, ids], [ids.int(), ids], [ids[:4], ids]):
        with pytest.raises((RuntimeError, IndexError)):
            decoder.forward(*good.values(), chosen, [None] * len(chosen))
    for index in (-1, 2):
        with pytest.raises((RuntimeError, IndexError)):
            decoder.feed_forward_half(index, hidden, hidden, ids, None)
    nothing = torch.zeros(0, 5, dtype=torch.int64)
    lean = prepare(tiny_model("llama"))
    assert lean.model(input_ids=nothing)[0].shape == (0, 5, 16)
