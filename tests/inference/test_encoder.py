"""The native encoder answers as the blocks that it stands for."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers.models.bert.modeling_bert import BertSelfOutput

from moe_dist.conversion import dense_to_moe
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference.backends import Form
from moe_dist.inference.backends.encoder import BLOCKS
from moe_dist.inference.backends.packed_linear import PackedLinear
from moe_dist.moe.routing import RoutingContext, record_routing, use_context
from tests.conversion.dense_models import VOCAB_SIZE, tiny_model, token_batch
from tests.inference.native_forms import (
    LIMITS,
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


def spread_choices(model: Any) -> None:
    """Let gates score far apart, so that texts go to several experts and no two score alike."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("gate.weight", "task_scores")):
                weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))


def wide(**options: Any) -> Any:
    """A BERT whose widths are no multiples of a block: three heads of 20, 130 neurons."""
    sizes = {"hidden_size": 60, "num_attention_heads": 3, "intermediate_size": 130}
    return tiny_model("bert", **sizes, max_position_embeddings=80, **options).eval()


@every_precision
@pytest.mark.parametrize("family", BLOCKS)
def test_every_family_and_router(family: str, precision: str) -> None:
    # A gate may choose otherwise where two experts score alike, so that is asked in float32.
    gates = ["token_gate", "sentence_gate"] * (precision == "fp32")
    for router in ("", "hash_random", *gates):
        model = routed(family, router=router) if router else tiny_model(family)
        assert error(model, prepare(model, precision), **token_batch()) < LIMITS[precision]


@every_precision
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 9, 16, 17, 63, 65, 79])
def test_any_widths_and_numbers_of_tokens(
    num_tokens: int, num_threads: int, precision: str
) -> None:
    model = wide()
    lean = prepare(model, precision)
    with threads(num_threads):
        for num_texts in (1, 3):
            ids = torch.randint(3, VOCAB_SIZE, (num_texts, num_tokens))
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
    # A gate may choose otherwise where two experts score alike, so that is asked in float32.
    for router in ("hash_random", *["token_gate"] * (precision == "fp32")):
        student = dense_to_moe(model, plan, router=router, top_k=top_k).eval()
        ids = torch.randint(3, VOCAB_SIZE, (2, 70))
        assert error(student, prepare(student, precision), input_ids=ids) < LIMITS[precision]


@needs_native
@pytest.mark.parametrize("router", ["token_gate", "sentence_gate", "hash_random", "task_gate"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("gate_scale", ["straight_through", "probability"])
def test_all_layers_are_one_call(router: str, top_k: int, gate_scale: str) -> None:
    """Whatever the router chooses by, and texts of unlike length."""
    model = routed("bert", router=router, top_k=top_k, gate_scale=gate_scale, num_tasks=3)
    spread_choices(model)
    lean = prepare(model)
    assert native_blocks(lean).is_one_call
    batch = token_batch()
    with use_context(RoutingContext(task_ids=torch.tensor([2, 0]))):
        assert error(model, lean, **batch) < 1e-5
        alone = {name: rows[:1] for name, rows in batch.items()}
    with use_context(RoutingContext(task_ids=torch.tensor([2]))):
        assert error(model, lean, **alone) < 1e-5


@needs_native
def test_tables_are_read_once_and_still_ask_for_token_ids() -> None:
    model = routed("bert", router="hash_random", top_k=2)
    lean = prepare(model)
    ids = torch.tensor([[3, VOCAB_SIZE - 1, 5]])
    assert native_blocks(lean)._tables_LNK.shape == (2, VOCAB_SIZE, 2)
    assert error(model, lean, input_ids=ids) < 1e-5
    with pytest.raises(MissingInputError, match="hash routing needs the token ids"):
        lean(inputs_embeds=torch.zeros(1, 3, 16))


@needs_native
def test_texts_choose_by_their_own_tokens() -> None:
    """Each text goes, whole, to the expert of its mean, without its padding and the others."""
    model = routed("bert", router="sentence_gate")
    spread_choices(model)
    lean = prepare(model)
    ids = torch.randint(3, VOCAB_SIZE, (6, 12))
    mask = torch.ones_like(ids)
    mask[1::2, 5:] = 0
    with record_routing() as record, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    chosen = {int(e) for entry in record.entries for e in entry.routing.expert_ids.unique()}
    assert len(chosen) > 1
    assert error(model, lean, input_ids=ids, attention_mask=mask) < 1e-5
    with torch.no_grad():
        together = lean(input_ids=ids, attention_mask=mask).logits
        alone = lean(input_ids=ids[1:2, :5]).logits
    assert torch.allclose(together[1:2], alone, atol=1e-5)


@every_precision
@pytest.mark.parametrize("num_threads", [1, 2])
def test_so_many_rows_that_they_go_in_parts(num_threads: int, precision: str) -> None:
    model = wide()
    students = [
        dense_to_moe(model, odd_plan(model, 0), router="hash_random", top_k=k) for k in (1, 2)
    ]
    ids = torch.randint(3, VOCAB_SIZE, (37, 33))
    mask = torch.ones_like(ids)
    mask[5:, 20:] = 0
    with threads(num_threads):
        for one in (model, *(student.eval() for student in students)):
            lean = prepare(one, precision)
            assert error(one, lean, input_ids=ids, attention_mask=mask) < LIMITS[precision]


@every_precision
@pytest.mark.parametrize("num_tokens", [64, 97, 512, 513])
def test_texts_of_more_tokens_than_a_block(num_tokens: int, precision: str) -> None:
    model = tiny_model("bert", max_position_embeddings=520).eval()
    ids = torch.randint(3, VOCAB_SIZE, (2, num_tokens))
    mask = torch.ones_like(ids)
    mask[1, num_tokens // 2 :] = 0
    lean = prepare(model, precision)
    assert error(model, lean, input_ids=ids, attention_mask=mask) < LIMITS[precision]


@needs_native
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "tanh"])
def test_activations(activation: str) -> None:
    model = wide(hidden_act=activation)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.mul_(8)  # far into both tails
    ids = torch.randint(3, VOCAB_SIZE, (2, 40))
    assert error(model, prepare(model, "fp32"), input_ids=ids) < LIMITS["fp32"]


@every_precision
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so_and_in_its_text(what: float, precision: str) -> None:
    encoder = native_blocks(prepare(wide(), precision))._encoder
    hidden = torch.randn(3, 9, 60)
    expected = encoder.forward(hidden, None, None, [], [])
    hidden[1, 4, 7] = what
    found = encoder.forward(hidden, None, None, [], [])
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@every_precision
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_every_kind(attention: str, precision: str) -> None:
    model = wide(attn_implementation=attention)
    lean = prepare(model, precision)
    ids = torch.randint(3, VOCAB_SIZE, (3, 33))
    padded = torch.ones_like(ids)
    padded[0, 20:], padded[1, :5] = 0, 0
    pairs = torch.ones(3, 1, 33, 33).tril().bool()
    if attention == "eager":  # adds what it is given
        pairs = torch.zeros(3, 1, 33, 33).masked_fill(~pairs, -1e4)
    for mask in (padded, torch.ones_like(ids), pairs):
        assert error(model, lean, input_ids=ids, attention_mask=mask) < LIMITS[precision]


@every_precision
def test_a_text_does_not_depend_on_what_else_is_there(precision: str) -> None:
    lean = prepare(wide(), precision)
    ids = torch.randint(3, VOCAB_SIZE, (5, 24))
    mask = torch.ones_like(ids)
    mask[1:, 10:] = 0
    with torch.no_grad():
        together = lean(input_ids=ids, attention_mask=mask).logits
        alone = lean(input_ids=ids[1:2, :10]).logits
    assert torch.allclose(together[1:2], alone, atol=0.05 if precision == "bf16" else 1e-5)


@every_precision
def test_calls_at_the_same_time(precision: str) -> None:
    lean = prepare(wide(), precision)
    batches = [torch.randint(3, VOCAB_SIZE, (2, length)) for length in range(3, 43)]
    with torch.no_grad():
        expected = [lean(input_ids=ids).logits for ids in batches]

        def answer(ids: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return lean(input_ids=ids).logits

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(answer, batches))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.skipif(not is_native("int8"), reason="not on this processor")
def test_int8_keeps_a_byte_for_each_weight_of_the_blocks() -> None:
    """As near as that lets: a row's own step for its inputs, an output's for its weights."""
    model = wide()
    errors = [
        error(model, prepare(model, name), input_ids=torch.arange(3, 40).view(1, -1))
        for name in ("fp32", "int8")
    ]
    assert errors[0] < 1e-5 < errors[1] < 0.05


@needs_native
def test_what_the_encoder_does_not_keep_is_refused() -> None:
    model = tiny_model("bert")
    lean = prepare(model, "fp32")
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ConversionError, match=f"does not keep what {name} asks for"):
            lean(**token_batch(), **{name: True})
        assert lean(**token_batch(), **{name: False}).logits is not None
    model.config.output_hidden_states = True
    with pytest.raises(ConversionError, match="output_hidden_states"):
        Form("lean").prepare(model)(**token_batch())


@needs_native
def test_a_model_that_was_asked_for_hidden_states_before() -> None:
    model = tiny_model("bert")
    model(**token_batch(), output_hidden_states=True)
    assert error(model, prepare(model, "fp32"), **token_batch()) < 1e-5


class _Tripled(BertSelfOutput):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 3 * super().forward(*args, **kwargs)


def test_other_models_keep_their_blocks() -> None:
    for family in ("mpnet", "gpt2", "t5"):
        with pytest.raises(ConversionError, match=r"only bert, .*, llama, .* have it"):
            Form("lean", "int8").prepare(tiny_model(family))
    hooked = tiny_model("bert")
    hooked.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    decoder = tiny_model("bert", is_decoder=True)
    relu_like = tiny_model("bert", hidden_act="mish")
    with_partial = tiny_model("bert")
    with_partial.bert.encoder.layer[1].register_forward_hook(functools.partial(print, end=""))
    changed = tiny_model("bert")
    changed.bert.encoder.layer[0].attention.output.__class__ = _Tripled
    odd = tiny_model("bert", hidden_size=18)
    for model, said in (
        (hooked, "a block has hooks"),
        (with_partial, "a block has hooks"),
        (changed, "a block holds a _Tripled"),
        (odd, "widths of 18 are no multiples of 4"),
        (decoder, "the model is a decoder"),
        (relu_like, "its activation is not known"),
    ):
        with pytest.raises(ConversionError, match=said):
            Form("lean", "int8").prepare(model)
        lean = Form("lean").prepare(model.eval())
        assert any(isinstance(module, PackedLinear) for module in lean.bert.encoder.modules())
        assert error(model, lean, **token_batch()) < 1e-5


@needs_native
def test_wrong_inputs_end_in_an_error() -> None:
    lean = prepare(routed(router="hash_random"), "fp32")
    encoder = native_blocks(lean)._encoder
    hidden = torch.randn(2, 5, 16)
    ids = torch.zeros(10, 1, dtype=torch.int64)
    for shares, chosen in (
        (torch.ones(2, 4), ([ids] * 2, [None] * 2)),
        (None, ([ids], [None])),
        (None, ([ids] * 2, [None])),
        (None, ([ids + 4] * 2, [None] * 2)),
        (None, ([None, ids], [None] * 2)),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            encoder.forward(hidden, None, shares, *chosen)
    for wrong_hidden, wrong_ids in (
        (hidden[..., :8], ids),
        (hidden, ids[:4]),
        (hidden, ids - 1),
        (hidden, ids + 4),
        (hidden, ids.int()),
        (hidden, None),
        (hidden[0, 0], ids),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            encoder.feed_forward_half(0, wrong_hidden, wrong_ids, None)
    for index in (-1, 2):
        with pytest.raises((RuntimeError, IndexError)):
            encoder.attention_half(index, hidden, None)
    for wrong in (hidden[..., :8], hidden[0], hidden.long()):
        with pytest.raises((RuntimeError, IndexError)):
            encoder.attention_half(0, wrong, None)
    for mask in (
        torch.ones(2, 1, 5, 4).bool(),
        torch.ones(2, 5).bool(),
        torch.ones(2, 1, 5, 5).long(),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            encoder.attention_half(0, hidden, mask)
    with pytest.raises(RuntimeError, match="several experts, and no ids"):
        encoder.forward(hidden, None, None, [], [])
    nothing = torch.zeros(0, 5, dtype=torch.int64)
    assert prepare(tiny_model("bert"), "fp32").bert(input_ids=nothing)[0].shape == (0, 5, 16)
