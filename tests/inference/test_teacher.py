"""A teacher in its quick form says and shows what it says and shows otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.inference.backends.encoder import BLOCKS
from moe_dist.inference.backends.native_blocks import UnsuitedError
from moe_dist.inference.backends.teacher import quick_teacher
from moe_dist.training.step import freeze
from tests.conversion.dense_models import tiny_model, token_batch
from tests.inference.native_forms import every_precision, needs_native
from tests.inference.test_backends import routed

LIMITS = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.06}
"""How far hidden states of tiny models may lie from eager ones, as a part of their length."""


@torch.no_grad()
def shown(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states of real tokens, then logits."""
    output = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    return [*(state[real].float() for state in output.hidden_states), output.logits.float()]


@every_precision
@pytest.mark.parametrize("family", BLOCKS)
def test_hidden_states_and_answers_of_every_family(family: str, precision: str) -> None:
    teacher, batch = freeze(tiny_model(family)), token_batch()
    expected = shown(teacher, batch)
    quick = quick_teacher(teacher, precision)
    assert quick is not teacher
    for _ in range(2):
        found = shown(quick, batch)
        assert len(found) == len(expected)
        for own, right in zip(found, expected, strict=True):
            assert own.shape == right.shape
            assert float((own - right).norm()) <= LIMITS[precision] * float(right.norm())
    # What lies between layers is a layer's own, and not one memory that the next one writes over.
    assert len({state.data_ptr() for state in found}) == len(found)
    assert all(torch.equal(*pair) for pair in zip(shown(teacher, batch), expected, strict=True))


@needs_native
def test_layers_are_native_and_the_rest_is_shared() -> None:
    teacher = freeze(tiny_model("bert"))
    quick: Any = quick_teacher(teacher, "fp32")
    theirs = {weight.data_ptr() for weight in teacher.parameters()}
    assert {weight.data_ptr() for weight in quick.parameters()} < theirs
    assert not list(quick.bert.encoder.layer.parameters())
    assert list(teacher.bert.encoder.layer.parameters())  # type: ignore[operator, union-attr]
    assert not quick.training


@needs_native
def test_under_autocast_states_stay_in_float32() -> None:
    quick: Any = quick_teacher(freeze(tiny_model("bert")), "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        states = quick(**token_batch(), output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.float32}


@needs_native
def test_what_has_no_such_form_says_why() -> None:
    scaled, other_heads = tiny_model("bert"), tiny_model("distilbert")
    scaled.bert.encoder.layer[1].attention.self.scaling = 0.01
    other_heads.config.n_heads = 1
    hooked = tiny_model("bert")
    hooked.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    for model, reason in (
        (tiny_model("gpt2"), "only bert"),
        (routed("bert"), "it has experts"),
        (hooked, "has hooks"),
        (scaled, "scales its scores"),
        (other_heads, "other heads"),
    ):
        with pytest.raises(UnsuitedError, match=reason):
            quick_teacher(freeze(model), "fp32")
