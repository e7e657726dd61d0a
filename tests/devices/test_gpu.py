"""The cases of the fake accelerator on a real GPU, and what only a real one can show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch

from moe_dist.moe import grouped_linear
from moe_dist.moe.on_device import has_grouped_products
from tests.devices.cases import all_cases
from tests.devices.layer_cases import layer_case
from tests.devices.prepared import OLDER
from tests.devices.run_cases import compare, run_case

pytestmark = pytest.mark.gpu
CASES = all_cases()
ROUTERS = ("hash_random", "hash_balanced", "token_gate", "sentence_gate", "task_gate")


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def gpu_with_grouped_products(gpu: torch.device) -> torch.device:
    if not has_grouped_products(gpu):
        name = torch.cuda.get_device_name(gpu)
        pytest.skip(f"torch multiplies groups in one kernel on Hopper and Blackwell, not on {name}")
    return gpu


@contextmanager
def grouped_products(are_used: bool) -> Iterator[None]:
    """Multiply groups in one kernel, or in a loop."""
    with mock.patch.object(grouped_linear, "has_grouped_products", return_value=are_used):
        yield


@pytest.mark.parametrize("name", [name for name in CASES if OLDER not in name])
def test_a_case_gives_what_a_cpu_gives(name: str, gpu: torch.device) -> None:
    found = run_case(CASES[name], gpu, None)[2]
    expected = run_case(CASES[name], torch.device("cpu"), None)[2]
    if "bf16" in name:
        # Rounded otherwise, a token may go to another expert; the loss hardly shows it.
        assert not compare(found[:1], expected[:1], 0.1)
    else:
        assert not compare(found, expected, 1e-3)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_kernel_gives_what_the_loop_gives(
    router: str, top_k: int, gpu_with_grouped_products: torch.device
) -> None:
    device = gpu_with_grouped_products
    case = partial(layer_case, router, "bf16", top_k=top_k)
    results = []
    for are_used in (True, False):
        with grouped_products(are_used):
            results.append(run_case(case, device, None)[2])
    fast, slow = results
    assert not compare(fast, slow, 2e-2)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_layer_keeps_the_host_waiting(
    router: str, top_k: int, gpu_with_grouped_products: torch.device
) -> None:
    prepared = layer_case(router, "bf16", gpu_with_grouped_products, top_k=top_k)
    prepared.forward().backward()  # Libraries are loaded, and kernels chosen.
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared.forward().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_group_without_rows_has_no_gradient(gpu_with_grouped_products: torch.device) -> None:
    counts = torch.tensor([0, 37, 0, 19], device=gpu_with_grouped_products)
    rows = torch.randn(56, 64, device=counts.device, dtype=torch.bfloat16)
    weight = torch.randn(4, 32, 64, device=counts.device, dtype=torch.bfloat16).requires_grad_()
    groups = grouped_linear.group_rows(counts, rows, on_device=True)
    # Memory that is taken again holds what was in it.
    torch.full_like(weight, float("nan"))
    grouped_linear.grouped_linear(rows, weight, None, groups).float().sum().backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())
    assert not weight.grad[[0, 2]].any()
