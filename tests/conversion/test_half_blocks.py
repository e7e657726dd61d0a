"""Norms and rotations in few passes give what transformers' own give, and their gradients."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import half_blocks as module_of_it
from moe_dist.conversion.half_blocks import half_blocks
from tests.conversion.dense_models import model_inputs, tiny_model, token_batch
from tests.inference.moe_students import student

LLAMA_KIND = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(params=[1, 2**19])
def cached_bytes(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time, or all of them."""
    monkeypatch.setattr(module_of_it, "CACHED_BYTES", request.param)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of the functions was asked."""
    calls = {"_RMSNorm": 0, "_Rotation": 0}
    for name in calls:
        function = getattr(module_of_it, name)
        own = function.apply

        def count(*args: Any, name: str = name, own: Any = own) -> Any:
            calls[name] += 1
            return own(*args)

        monkeypatch.setattr(function, "apply", count)
    return calls


def step(model: Any, *, fast: bool, autocast: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden states and all gradients."""
    model.zero_grad()
    batch = model_inputs(model, token_batch())
    with (
        half_blocks(model) if fast else nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        output = model(**batch, output_hidden_states=True)
        hidden = output.get("hidden_states") or output.get("decoder_hidden_states")
        weights = torch.linspace(-1, 1, hidden[-1].numel()).view(hidden[-1].shape)
        (hidden[-1].float() * weights).sum().backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return hidden[-1].detach(), found


@pytest.mark.parametrize("family", [*LLAMA_KIND, "t5"])
def test_steps_are_as_before_but_for_rounding(
    family: str, cached_bytes: None, taken: dict[str, int]
) -> None:
    model = tiny_model(family).eval()
    plain, plain_grads = step(model, fast=False)
    assert not any(taken.values())
    found, grads = step(model, fast=True)
    assert taken["_RMSNorm"] > 1 and (taken["_Rotation"] > 1) == (family != "t5")
    assert torch.allclose(found, plain, atol=0.02 * float(plain.abs().max()))
    assert grads.keys() == plain_grads.keys()
    for name, plain_grad in plain_grads.items():
        assert grads[name].dtype == torch.float32
        assert float((grads[name] - plain_grad).norm()) <= 0.03 * float(plain_grad.norm()), name


def test_a_student_with_experts_routes_as_before(cached_bytes: None) -> None:
    """Its gates read norms in float32, whatever linear layers read."""
    model = student("llama", router="token_gate").eval()
    plain, plain_grads = step(model, fast=False)
    found, grads = step(model, fast=True)
    assert torch.allclose(found, plain, atol=0.02 * float(plain.abs().max()))
    for name, plain_grad in plain_grads.items():
        assert float((grads[name] - plain_grad).norm()) <= 0.03 * float(plain_grad.norm()), name


@pytest.mark.parametrize("half", [True, False])
def test_norms_are_exact(half: bool, cached_bytes: None) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(6, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
    given, weights = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    results = []
    for dtype in (torch.float64, torch.float32):
        norm, hidden = norm.to(dtype), given.to(dtype).requires_grad_()
        if dtype is torch.float64:
            out = norm.weight * hidden * (hidden.square().mean(-1, True) + 1e-5).rsqrt()
        else:
            out = module_of_it._RMSNorm.apply(
                hidden, norm.weight, 1e-5, torch.bfloat16 if half else torch.float32
            )
        grads = torch.autograd.grad((out.to(dtype) * weights).sum(), [hidden, norm.weight])
        results.append([out.double(), *(grad.double() for grad in grads)])
    for one, right in zip(*results, strict=True):
        assert torch.allclose(one, right, atol=0.02 if half else 1e-5)


def test_rotations_are_exact_and_their_gradients_too(cached_bytes: None) -> None:
    """Also with other angles for each half, of which no model has any."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, 5, 2, 8, generator=generator).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(3, 1, 5, 8, generator=generator) for _ in range(2))
    halves = torch.cat([-heads[..., 4:], heads[..., :4]], dim=-1)
    expected = heads * cos + halves * sin
    found = module_of_it._Rotation.apply(heads, cos, sin)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())
    weights = torch.randn(expected.shape, generator=generator).bfloat16()
    (right,) = torch.autograd.grad(expected, [heads], weights.float())
    (own,) = torch.autograd.grad(found, [heads], weights)
    assert torch.allclose(own, right, atol=1e-6)


def test_without_autocast_all_is_as_it_was(taken: dict[str, int]) -> None:
    model = tiny_model("llama").eval()
    plain, _ = step(model, fast=False, autocast=False)
    found, _ = step(model, fast=True, autocast=False)
    assert torch.equal(found, plain) and not any(taken.values())


def test_models_are_left_as_they_were() -> None:
    from transformers.models.llama import modeling_llama

    model, own = tiny_model("llama"), modeling_llama.apply_rotary_pos_emb
    with half_blocks(model), half_blocks(model):
        assert modeling_llama.apply_rotary_pos_emb is not own
        assert any("forward" in vars(module) for module in model.modules())
    assert modeling_llama.apply_rotary_pos_emb is own
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_uses_may_end_in_any_order(family: str) -> None:
    model = tiny_model(family)
    norms = [one for one in model.modules() if type(one).__name__.endswith("Norm")]
    rotating = sys.modules[type(model).__module__]
    rotation = getattr(rotating, "apply_rotary_pos_emb", None)
    first, second = half_blocks(model), half_blocks(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert any("forward" in vars(one) for one in norms)
    second.__exit__(None, None, None)
    assert not any("forward" in vars(one) for one in norms)
    assert getattr(rotating, "apply_rotary_pos_emb", None) is rotation
