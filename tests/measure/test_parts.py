"""Parts of a model are found in every family and form, and timed by themselves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_dist.inference.backends import Form
from moe_dist.inference.backends.native import load_operators
from moe_dist.inference.backends.native_blocks import PRECISIONS
from moe_dist.measure.latency import random_batch
from moe_dist.measure.parts import find_parts, self_times, timed_parts
from moe_dist.moe.layer import moe_layers
from tests.conversion.dense_models import tiny_model
from tests.inference.moe_students import student


def count(model: Any) -> Counter[str]:
    return Counter(name for _, name in find_parts(model))


def _has_native_blocks() -> bool:
    return load_operators() and bool(torch.ops.moe_dist.multiplies(PRECISIONS["fp32"]))


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "t5", "modernbert"])
def test_dense_models_have_parts(family: str) -> None:
    parts = count(tiny_model(family))
    assert {"embeddings", "attention", "feed-forward", "head"} <= set(parts)
    # Two layers, of which a T5 has two stacks, one with two kinds of attention.
    assert parts["attention"] == (6 if family == "t5" else 2)
    assert "router" not in parts


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_students_have_routers_and_experts(family: str) -> None:
    model = student(family, router="token_gate", tie_shared=True)
    parts, layers = count(model), moe_layers(model)
    assert parts["dispatch"] == parts["router"] == len(layers)
    assert parts["experts"] == 2 * len(layers)
    assert "feed-forward" not in parts


def test_a_lean_student_has_one_part_for_dispatch_and_experts() -> None:
    parts = count(Form("lean", "fp32").prepare(student("gpt2", router="hash_random")))
    assert parts["dispatch and experts"] == parts["router"] == 2
    assert count(Form("lean", "fp32").prepare(tiny_model("gpt2")))["feed-forward"] > 0


@pytest.mark.skipif(not _has_native_blocks(), reason="not on this processor")
@pytest.mark.parametrize(
    ("family", "router", "expected"),
    [
        ("bert", "", {"attention and feed-forward": 1}),
        ("bert", "token_gate", {"attention, router and experts": 1}),
        # Ids are looked up within the call, before the first layer.
        ("bert", "hash_random", {"attention, router and experts": 1}),
        ("llama", "", {"attention and feed-forward": 1}),
        ("llama", "token_gate", {"attention, router and experts": 1}),
        ("llama", "hash_random", {"attention, router and experts": 1}),
        ("llama", "sentence_gate", {"attention and experts": 1, "router": 2}),
    ],
)
def test_blocks_that_are_one_native_object_are_one_part(
    family: str, router: str, expected: dict[str, int]
) -> None:
    model = student(family, router=router) if router else tiny_model(family)
    lean = Form("lean", "fp32").prepare(model.eval())
    with timed_parts(lean) as timer, torch.inference_mode():
        lean(**random_batch(lean, 1, 8))
    parts = dict(timer.calls)
    assert parts.pop("rest") == parts.pop("embeddings") == 1
    parts.pop("head")
    assert parts == expected


def test_each_part_is_timed_without_those_inside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(router="token_gate").eval()
    batch = random_batch(model, 1, 8)
    plain = model(**batch)[0]
    clock_s = [0.0]

    def take(seconds: float) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            clock_s[0] += seconds

        return hook

    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(take(0.02))
        layer.router.register_forward_hook(take(0.005))  # type: ignore[union-attr]
        layer.register_forward_pre_hook(take(0.001))
    monkeypatch.setattr(time, "perf_counter", lambda: clock_s[0])
    before = {id(module): len(module._forward_hooks) for module in model.modules()}
    with timed_parts(model) as timer, torch.inference_mode():
        answer = model(**batch)[0]
    assert torch.allclose(answer, plain)
    assert timer.calls == {
        "rest": 1,
        "embeddings": 1,
        "attention": 2,
        "dispatch": 2,
        "router": 2,
        "experts": 2,
        "head": 2,
    }
    expected = dict.fromkeys(timer.calls, 0.0)
    expected |= {"experts": 40.0, "router": 10.0, "dispatch": 2.0}
    assert timer.milliseconds == pytest.approx(expected)
    assert before == {id(module): len(module._forward_hooks) for module in model.modules()}


def test_hooks_go_when_a_pass_fails() -> None:
    model = tiny_model("bert")
    with pytest.raises(IndexError), timed_parts(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert not any(module._forward_hooks for module in model.modules())


def test_time_of_nested_ranges_counts_once() -> None:
    spans = [("step", 0.0, 10.0), ("losses", 1.0, 6.0), ("teacher", 2.0, 4.0), ("step", 20.0, 21.0)]
    assert self_times(spans) == {"step": 6.0, "losses": 3.0, "teacher": 2.0}
    assert self_times([("a", 0.0, 1.0), ("a", 0.0, 1.0)]) == {"a": 1.0}
