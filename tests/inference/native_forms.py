"""What tests of native blocks share: the precisions of this machine, and how near answers are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moe_dist.conversion import PartitionPlan, plan_partition
from moe_dist.inference.backends import Form, native
from moe_dist.inference.backends.native_blocks import PRECISIONS, NativeBlocks
from tests.conversion.dense_models import random_scores

LIMITS = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.1}
"""How far answers of tiny models may lie from eager ones, as a part of the largest."""


def is_native(precision: str) -> bool:
    """Whether this processor has products of a precision."""
    loaded = native.load_operators()
    return loaded and bool(torch.ops.moe_dist.multiplies(PRECISIONS[precision]))


every_precision = pytest.mark.parametrize(
    "precision",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(not is_native(name), reason="not on this processor")
        )
        for name in PRECISIONS
    ],
)
needs_native = pytest.mark.skipif(not is_native("fp32"), reason="not on this processor")


def prepare(model: Any, precision: str = "fp32") -> Any:
    """The lean form; its blocks must be native."""
    lean = Form("lean", precision).prepare(model)
    assert sum(isinstance(module, NativeBlocks) for module in lean.modules()) == 1
    return lean


def odd_plan(model: Any, num_shared: int) -> PartitionPlan:
    """Three experts of 41 neurons, which are no multiple of four."""
    return plan_partition(
        random_scores(model),
        num_experts=3,
        expert_size=41,
        num_shared_neurons=num_shared,
        method="importance",
    )


def native_blocks(lean: Any) -> Any:
    return next(module for module in lean.modules() if isinstance(module, NativeBlocks))


@torch.no_grad()
def error(model: Any, lean: Any, **inputs: Any) -> float:
    """The largest difference of the last hidden states of real tokens, relative to the largest."""
    expected = model.base_model(**inputs)[0].float()
    found = lean.base_model(**inputs)[0].float()
    assert found.shape == expected.shape
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        real = mask[:, -expected.shape[1] :].bool()
        expected, found = expected[real], found[real]
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
