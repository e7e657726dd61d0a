"""Every form of a model answers as the eager one does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.errors import ConversionError
from moe_dist.inference.backends import ALL_FORMS, Form, native
from moe_dist.inference.backends.packed_linear import PackedLinear
from moe_dist.inference.backends.routed_ffn import RoutedFFN
from moe_dist.moe.routing import RoutingContext, use_context
from tests.conversion.dense_models import (
    EVERY_FAMILY,
    NUM_NEURONS,
    VOCAB_SIZE,
    logits_of,
    random_scores,
    tiny_model,
    token_batch,
)
from tests.inference.moe_students import student

ROUTERS = ("token_gate", "sentence_gate", "task_gate", "hash_random", "hash_balanced")
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}
every_form = pytest.mark.parametrize("form", ALL_FORMS, ids=str)


def routed(family: str = "bert", **options: Any) -> Any:
    model = tiny_model(family)
    sizes = {"num_experts": 4, "expert_size": 12, "num_shared_neurons": 6, "tie_shared": True}
    sizes |= {name: options.pop(name) for name in list(options) if name in sizes}
    plan = plan_partition(random_scores(model), **sizes)
    if options.get("router") == "hash_balanced":
        options["token_counts"] = torch.arange(VOCAB_SIZE)
    return dense_to_moe(model, plan, **options).eval()


def differ(model: Any, form: Form, **batch: Any) -> float:
    """How far answers lie from the model's own, as a part of the largest."""
    inputs = token_batch(**batch)
    expected = logits_of(model, inputs).float()
    found = logits_of(form.prepare(model), inputs)
    real = inputs["attention_mask"].bool()
    if expected.shape[:2] == real.shape:
        expected, found = expected[real], found[real]
    return float((found.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("dense", [False, True], ids=["experts", "dense"])
def test_every_family_answers_alike(family: str, dense: bool) -> None:
    """In float32 as the model; in bfloat16 as eager torch, as near as that precision lets it."""
    model = tiny_model(family) if dense else routed(family)
    assert differ(model, Form("lean")) < 1e-5
    eager = Form("eager", "bf16")
    assert differ(model, eager) < 0.1
    assert differ(eager.prepare(model), Form("lean", "bf16")) < 0.05


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_router_chooses_alike(router: str, top_k: int) -> None:
    model = routed(router=router, top_k=top_k, num_tasks=3 if router == "task_gate" else None)
    with use_context(RoutingContext(task_ids=torch.tensor([0, 2, 1, 2]))):
        assert differ(model, Form("lean")) < 1e-5


def test_probabilities_scale_the_experts() -> None:
    model = routed(gate_scale="probability")
    assert differ(model, Form("lean")) < 1e-5


@pytest.mark.parametrize("num_shared", [0, NUM_NEURONS])
def test_experts_of_any_sizes(num_shared: int) -> None:
    """Nothing shared; and experts with no neurons of their own."""
    model = routed(expert_size=8 if not num_shared else NUM_NEURONS, num_shared_neurons=num_shared)
    assert differ(model, Form("lean")) < 1e-5


def test_one_expert_needs_no_router() -> None:
    assert differ(routed(num_experts=1, num_shared_neurons=0), Form("lean")) < 1e-5


@pytest.mark.parametrize("length", [1, 5, 24])
@every_form
def test_any_number_of_tokens(form: Form, length: int) -> None:
    assert differ(routed(), form, num_samples=3, length=max(2, length)) < TOLERANCE[form.precision]


def test_without_a_compiler_torch_does_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load_operators.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not native.load_operators()
        assert "no native operators here" in caplog.text
        assert "no-such-compiler" in caplog.text
        for top_k in (1, 2):
            assert differ(routed(top_k=top_k), Form("lean")) < 1e-5
            assert differ(routed(top_k=top_k), Form("lean", "bf16")) < 0.02
    finally:
        native.load_operators.cache_clear()


def test_torch_and_the_native_operator_are_equal() -> None:
    for family in ("bert", "llama", "t5", "gpt2"):
        lean = Form("lean").prepare(routed(family, router="token_gate", top_k=2))
        ffn = next(module for module in lean.modules() if isinstance(module, RoutedFFN))
        hidden = torch.randn(11, 16)
        routing = ffn._choose(ffn.router, hidden)
        torch.testing.assert_close(
            ffn._experts.apply(hidden, routing), ffn._experts.apply_by_torch(hidden, routing)
        )


def test_a_lean_model_generates_alike() -> None:
    for family in ("gpt2", "llama", "t5"):
        model = routed(family)
        batch = token_batch()
        batch = {"input_ids": batch["input_ids"].clamp(min=3)}
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(**batch, **options)
        assert torch.equal(Form("lean").prepare(model).generate(**batch, **options), expected)


def test_the_model_itself_is_left_as_it_was() -> None:
    model = student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lean = Form("lean", "bf16").prepare(model)
    assert any(isinstance(module, PackedLinear) for module in lean.modules())
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_what_has_no_lean_form_is_refused() -> None:
    model = tiny_model("bert")
    plan = plan_partition(
        random_scores(model),
        num_experts=2,
        expert_size=NUM_NEURONS,
        num_shared_neurons=0,
        method="full_copy",
    )
    merged = dense_to_moe(model, plan, router="merged_sequence")
    with pytest.raises(ConversionError, match=r"merges its experts[^$]*--fold"):
        Form("lean").prepare(merged)
    with pytest.raises(ConversionError, match="'fast' is not one of eager, lean"):
        Form.parse("fast-fp32")
    with pytest.raises(ConversionError, match="'int4' is not one of fp32, bf16"):
        Form.parse("lean-int4")
