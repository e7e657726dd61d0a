"""Clipping inside a fused step is clipping before it."""

from __future__ import annotations

import pytest
import torch

from moe_dist.distributed.update import clipped, scale_gradients


def optimizer(*, fused: bool) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.randn(5, 3, generator=generator)
    return torch.optim.AdamW(parameters, lr=0.1, fused=fused)


def tensors(made: torch.optim.Optimizer) -> list[torch.Tensor]:
    parameters = made.param_groups[0]["params"]
    moments = [made.state[one][name] for one in parameters for name in ("exp_avg", "exp_avg_sq")]
    return [*parameters, *moments]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_weights_and_moments_are_those_of_scaled_gradients(fused: bool, max_norm: float) -> None:
    plain, own = optimizer(fused=fused), optimizer(fused=fused)
    gradients = [[p.grad for p in one.param_groups[0]["params"]] for one in (plain, own)]
    scale_gradients(gradients[0], 5.0, max_norm)
    plain.step()
    before = gradients[1][0].clone()
    with clipped(own, gradients[1], 5.0, max_norm):
        # A fused step reads them as they are.
        assert torch.equal(gradients[1][0], before) == (fused or max_norm != 0.5)
        own.step()
    for one, right in zip(tensors(own), tensors(plain), strict=True):
        assert torch.allclose(one, right, atol=1e-6)
    assert not hasattr(own, "grad_scale")
