"""Every form of a model answers as the eager one does."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.heads import TaskHead, set_heads
from moe_dist.data.cache import build_once
from moe_dist.digests import file_digest
from moe_dist.errors import ConversionError
from moe_dist.inference import load_model, save_model
from moe_dist.inference.backends import QUICK_FORMS, Form, native
from moe_dist.inference.backends.eager import DTYPES
from moe_dist.inference.backends.packed_linear import PackedLinear
from moe_dist.inference.backends.routed_ffn import RoutedFFN
from moe_dist.moe.layer import moe_layers
from moe_dist.moe.routing import Routing, RoutingContext, use_context
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
every_form = pytest.mark.parametrize("form", QUICK_FORMS, ids=str)


def routed(family: str = "bert", **options: Any) -> Any:
    sizes = {"expert_size": 12, "num_shared": 6, "tie_shared": True}
    if options.get("router") == "hash_balanced":
        options["token_counts"] = torch.arange(VOCAB_SIZE)
    return student(family, **sizes | options).eval()


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
    if not dense:
        assert differ(routed(family, router="token_gate"), Form("lean")) < 1e-5
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
    model = routed(expert_size=8 if not num_shared else NUM_NEURONS, num_shared=num_shared)
    assert differ(model, Form("lean")) < 1e-5


def test_one_expert_needs_no_router() -> None:
    assert differ(routed(num_experts=1, num_shared=0), Form("lean")) < 1e-5


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 72])
@pytest.mark.parametrize("top_k", [1, 2])
@every_form
def test_any_number_of_tokens(form: Form, top_k: int, num_tokens: int) -> None:
    # In half precision a gate may choose otherwise where two experts score alike.
    router = "token_gate" if form.precision == "fp32" else "hash_random"
    model = routed(router=router, top_k=top_k)
    ids = torch.randint(3, VOCAB_SIZE, (max(1, num_tokens // 24), min(24, num_tokens)))
    expected = logits_of(model, {"input_ids": ids})
    found = logits_of(form.prepare(model), {"input_ids": ids}).float()
    limit = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.1}[form.precision]
    assert float((found - expected).abs().max() / expected.abs().max()) < limit


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
        assert "there is no C++ compiler 'no-such-compiler'" in caplog.text
        for top_k in (1, 2):
            assert differ(routed(top_k=top_k), Form("lean")) < 1e-5
            assert differ(routed(top_k=top_k), Form("lean", "bf16")) < 0.05
    finally:
        native.load_operators.cache_clear()


def test_a_compiler_that_failed_is_not_asked_by_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "broken-cxx"
    compiler.write_text(
        f"#!/bin/sh\necho asked >> {tmp_path}/asked\necho 'error: no' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    native.load_operators.cache_clear()
    try:
        counts = []
        for _ in range(2):
            with caplog.at_level(logging.WARNING):
                assert not native.load_operators()
            native.load_operators.cache_clear()
            counts.append((tmp_path / "asked").read_text().count("asked"))
        assert counts[0] == counts[1] <= len(native.SOURCES)
        assert "a compiler failed lately: error: no" in caplog.text
        (noted,) = (tmp_path / "cache" / "operators").glob("*.failed")
        os.utime(noted, (0, 0))
        assert not native.load_operators()
        assert (tmp_path / "asked").read_text().count("asked") > counts[0]
    finally:
        native.load_operators.cache_clear()


@pytest.mark.skipif(not native.load_operators(), reason="no C++ compiler here")
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["mpnet", "modernbert", "t5", "gpt2"])
def test_torch_and_the_native_operator_are_equal(family: str, precision: str, top_k: int) -> None:
    lean = Form("lean", precision).prepare(routed(family, router="token_gate", top_k=top_k))
    ffn = next(module for module in lean.modules() if isinstance(module, RoutedFFN))
    hidden = torch.randn(37, 16, dtype=DTYPES[precision])
    routing = ffn._choose(ffn.router, hidden)
    found = ffn._experts.apply(hidden, routing)
    expected = ffn._experts.apply_by_torch(hidden, routing)
    limit = 1e-6 if precision == "fp32" else 0.02
    assert float((found - expected).abs().max()) < limit * float(expected.abs().max())


@pytest.mark.skipif(not native.load_operators(), reason="no C++ compiler here")
def test_the_native_operator_refuses_what_does_not_fit() -> None:
    lean = Form("lean").prepare(routed("mpnet", router="token_gate"))
    experts = next(m for m in lean.modules() if isinstance(m, RoutedFFN))._experts
    hidden, ids = torch.randn(5, 16), torch.zeros(5, 1, dtype=torch.int64)
    for wrong_hidden, wrong_ids in (
        (hidden, ids[:2]),
        (hidden, ids - 1),
        (hidden, ids + 4),
        (hidden, ids.int()),
        (hidden.double(), ids),
        (hidden[0], ids),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            experts.apply(wrong_hidden, Routing(wrong_ids, hidden[:, :1], unit_weights=True))


@pytest.mark.parametrize("router", ["token_gate", "hash_random"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_changes_nothing_but_precision(router: str, precision: str) -> None:
    model = routed(router=router, num_shared=0, expert_size=8)
    lean = Form("lean", precision).prepare(model)
    expected = logits_of(model, token_batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(lean, token_batch()).float()
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05


def test_a_lean_model_generates_alike() -> None:
    for family, router in itertools.product(("gpt2", "llama", "t5"), ("token_gate", "hash_random")):
        model = routed(family, router=router)
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


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "bart"])
@pytest.mark.parametrize("router", ["", "token_gate"])
def test_a_lean_model_does_not_follow_the_one_that_it_was_made_of(family: str, router: str) -> None:
    """Weights are shared while it is prepared, and no longer."""
    for precision in ("fp32", "bf16"):
        model = routed(family, router=router) if router else tiny_model(family)
        lean = Form("lean", precision).prepare(model)
        before = logits_of(lean, token_batch())
        assert all(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(logits_of(lean, token_batch()), before)
        assert not any(parameter.requires_grad for parameter in lean.parameters())


def test_a_lean_model_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model = student(router="token_gate")
    save_model(model, tmp_path / "model")
    inputs = token_batch()
    for precision in ("fp32", "bf16"):
        lean = Form("lean", precision).prepare(model)
        embedded = torch.randn(4, 7, 16, requires_grad=True, dtype=DTYPES[precision])
        for said, act in (
            ("be saved", lambda lean=lean: save_model(lean, tmp_path / "model")),
            ("be saved", lambda lean=lean: lean.save_pretrained(tmp_path / "other")),
            ("learn", lambda lean=lean: lean.train()),
            ("be copied", lambda lean=lean: copy.deepcopy(lean)),
            ("be copied", lambda lean=lean: pickle.dumps(lean)),
            ("be cast", lambda lean=lean: lean.half()),
            ("be prepared twice", lambda lean=lean: Form("lean").prepare(lean)),
            ("be prepared twice", lambda lean=lean: Form("eager").prepare(lean)),
            ("give gradients", lambda lean=lean, e=embedded: lean(inputs_embeds=e)),
        ):
            with pytest.raises(ConversionError, match=f"lean form cannot {said}"):
                act()
        assert not any(module.training for module in lean.modules())
        assert {value.dtype for value in lean.parameters()} >= {DTYPES[precision]}
        assert torch.float16 not in {value.dtype for value in lean.parameters()}
        assert lean.eval() is lean
    # What was there is still whole.
    assert torch.equal(logits_of(load_model(tmp_path / "model"), inputs), logits_of(model, inputs))


def test_what_hangs_on_a_layer_is_not_left_out() -> None:
    for change in (
        lambda model: model.classifier.register_forward_hook(lambda *_: None),
        lambda model: setattr(model.classifier, "forward", torch.neg),
        lambda model: setattr(moe_layers(model)[0], "dispatcher", object()),
    ):
        model = student(router="token_gate")
        change(model)
        with pytest.raises(ConversionError, match="of its own, which the lean form"):
            Form("lean").prepare(model)


def test_hooks_of_others_stay() -> None:
    lean = Form("lean").prepare(routed(router="token_gate"))
    seen = []
    lean.bert.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    logits_of(lean, token_batch())
    assert len(seen) == 1


def test_a_damaged_library_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "operators.so").write_bytes(b"whole")
        (directory / "operators.sha256").write_text(file_digest(directory / "operators.so"))

    final = tmp_path / "operators"
    for _ in range(2):
        build_once(final, build, is_good=native._is_whole)
    assert len(built) == 1
    (final / "operators.so").write_bytes(b"who")
    build_once(final, build, is_good=native._is_whole)
    assert len(built) == 2
    assert (final / "operators.so").read_bytes() == b"whole"


def test_a_processor_that_cannot_pack_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = routed(router="token_gate")
    lean = Form("lean", "bf16").prepare(model)
    assert not next(m for m in lean.modules() if isinstance(m, PackedLinear))._packed.is_mkldnn
    expected = logits_of(model, token_batch())
    assert float((logits_of(lean, token_batch()) - expected).abs().max()) < 0.05 * float(
        expected.abs().max()
    )


@pytest.mark.parametrize(
    ("router", "has_heads", "remedy"),
    [
        ("merged_task", False, "`moe-dist export DIR --fold`"),
        ("merged_task", True, "`moe-dist export DIR --fold --task NAME`"),
        ("merged_sequence", False, "`moe-dist export DIR --average`"),
        ("merged_token", True, "`moe-dist export DIR --average --task NAME`"),
    ],
)
def test_merged_experts_are_refused_with_a_remedy_that_their_router_allows(
    router: str, has_heads: bool, remedy: str
) -> None:
    model = tiny_model("bert", num_labels=5)
    if has_heads:
        set_heads(model, [TaskHead("a", ("no", "yes")), TaskHead("b", ("x", "y", "z"))])
    plan = plan_partition(
        random_scores(model),
        num_experts=2,
        expert_size=NUM_NEURONS,
        num_shared_neurons=0,
        method="full_copy",
    )
    merged = dense_to_moe(model, plan, router=router, num_tasks=2 if has_heads else 1)
    for form, title in ((Form("lean"), "lean"), (Form("onnx"), "ONNX")):
        with pytest.raises(ConversionError, match="merges its experts") as found:
            form.prepare(merged)
        assert f"which has no {title} form" in found.value.message
        assert remedy in (found.value.remedy or "")


def test_forms_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConversionError, match="'fast' is not one of eager, lean"):
        Form.parse("fast-fp32")
    with pytest.raises(ConversionError, match="'int4' is not one of fp32, bf16"):
        Form.parse("lean-int4")
