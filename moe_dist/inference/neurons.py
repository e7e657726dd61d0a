"""An expert as a set of neurons: read, written, measured; and a model with other experts.

Shapes: D model, F neurons of an expert, N numbers that make a neuron, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_dist.conversion.convert import with_modes_of
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer

INTO = ("w_in", "b_in", "w_gate", "b_gate")
"""Weights by which a neuron reads its input."""


def rebuilt(model: Any, changes: Mapping[str, Any]) -> Any:
    """Make a model of the same class with changed entries of its `moe`, all else copied.

    Its experts and routers are still to be filled.
    """
    config = copy.deepcopy(model.config)
    config.moe = {**config.moe, **changes}
    with torch.random.fork_rng(devices=[]):
        fresh = type(model)(config)
    first = next(model.parameters())
    fresh.to(device=first.device, dtype=first.dtype)
    inside = tuple(
        f"{name}." for name, layer in model.named_modules() if isinstance(layer, MoELayer)
    )
    state = {
        name: value for name, value in model.state_dict().items() if not name.startswith(inside)
    }
    _, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    return with_modes_of(model, fresh)


@torch.no_grad()
def neuron_norms(experts: Experts) -> Tensor:
    """Give (E, F) float32 sizes of neurons: length of input weights times that of the output's."""
    if experts.w_out is None:
        return torch.zeros(experts.num_experts, 0)
    into = [
        tensor.float().square().reshape(*tensor.shape[:2], -1).sum(dim=-1)
        for name in INTO
        if (tensor := getattr(experts, name)) is not None
    ]
    total_EF = torch.stack(into).sum(dim=0).sqrt() * experts.w_out.float().norm(dim=1)
    return total_EF.cpu()


def neuron_vectors(experts: Experts) -> Tensor:
    """(E, F, N) float32: all numbers that make each neuron, side by side."""
    assert experts.w_in is not None and experts.w_out is not None
    parts = [experts.w_in, experts.w_out.transpose(1, 2)]
    for extra in (experts.w_gate, experts.b_in, experts.b_gate):
        if extra is not None:
            parts.append(extra if extra.dim() == 3 else extra.unsqueeze(-1))
    return torch.cat([part.detach().float() for part in parts], dim=-1)


def neurons_of(experts: Experts, expert: int) -> dict[str, Tensor]:
    """One expert's weights with neurons in the first dimension, copied."""
    assert experts.w_out is not None
    found = {"w_out": experts.w_out[expert].t().clone()}
    for name in INTO:
        tensor = getattr(experts, name)
        if tensor is not None:
            found[name] = tensor[expert].clone()
    return found


def put_neurons(experts: Experts, index: int, neurons: Mapping[str, Tensor]) -> None:
    """Write one expert's weights; neurons are in the first dimension, as of `neurons_of`."""
    for name, values in neurons.items():
        target = getattr(experts, name)[index]
        target.copy_(values.t() if name == "w_out" else values)
