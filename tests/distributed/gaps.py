"""How far spread experts are from an oracle that has all of them in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.moe.routing import RoutingContext, use_context

Slow = Callable[[Any, Tensor], Tensor]


def oracle_of(
    model: Any, slow: Slow, contexts: list[RoutingContext]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of all ranks' batches, and the gradients of their sum of squares."""
    outputs = []
    for context in contexts:
        with use_context(context):
            outputs.append(slow(model.moe, model.embedding(context.token_ids)))
    torch.stack([out.square().sum() for out in outputs]).sum().backward()
    grads = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
        if not name.startswith("head")
    }
    return [out.detach() for out in outputs], grads


def largest_gap(
    model: Any, context: RoutingContext, expected: Tensor, wanted: dict[str, Tensor], ep: int
) -> float:
    """The largest relative difference in this rank's output and gradients, summed over ranks."""
    from moe_dist.distributed.expert_parallel import parallelize_experts

    parallelize_experts(model, ep)
    if ep > 1:
        model.moe.set_deepspeed_parallelism()
    with use_context(context):
        out = model.moe(model.embedding(context.token_ids))
    out.square().sum().backward()
    gaps = [float((out - expected).abs().max())]
    for name, value in model.named_parameters():
        if name in wanted:
            grad = torch.zeros_like(value) if value.grad is None else value.grad.clone()
            want = wanted[name]
            if ep > 1 and ".experts." in name:
                want = want.chunk(ep)[dist.get_rank() % ep]
            else:
                dist.all_reduce(grad)
            gaps.append(float((grad - want).abs().max()) / max(1.0, float(want.abs().max())))
    return max(gaps)
