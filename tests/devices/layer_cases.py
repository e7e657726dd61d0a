"""One layer by each router, and layers that are wrong on purpose."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.moe import Experts, MergedLayer, MoELayer, RoutingContext, build_router, use_context
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.routing import record_routing
from moe_dist.router_spec import RouterSpec, router_facts
from tests.devices.prepared import NUM_EXPERTS, OLDER, PRECISIONS, Case, Prepared, autocast

D_MODEL, EXPERT_SIZE, VOCAB_SIZE, NUM_TASKS = 16, 16, 50, 2


def layer_case(
    router: str,
    precision: str,
    device: torch.device,
    *,
    expert_size: int = EXPERT_SIZE,
    **options: Any,
) -> Prepared:
    """One layer in training, over padded sentences, with shared neurons and noise."""
    torch.manual_seed(0)
    merges = router_facts(router).merges
    spec = RouterSpec.of(
        router, **({} if merges else {"gate_noise": 0.1}), **({"top_k": 2} | options)
    )
    gate = build_router(
        spec,
        d_model=D_MODEL,
        num_experts=NUM_EXPERTS,
        vocab_size=VOCAB_SIZE,
        token_counts=torch.ones(VOCAB_SIZE),
        num_tasks=NUM_TASKS,
        seed=3,
    )
    experts = Experts(NUM_EXPERTS, D_MODEL, expert_size, activation="gelu")
    shared = Experts(1, D_MODEL, 8, activation="gelu", bias_out=False)
    if merges:
        layer: MoELayer = MergedLayer(experts, gate, shared=shared, name="layer")
    else:
        layer = MoELayer(experts, gate, shared=shared, name="layer", capacity=Capacity.of(spec))
    layer = layer.to(device).train()
    hidden = torch.randn(3, 8, D_MODEL).to(device).requires_grad_()
    ids = torch.randint(VOCAB_SIZE, (3, 8)).to(device)
    mask = (torch.arange(8) < torch.tensor([[8], [5], [6]])).to(device)
    context = RoutingContext(
        ids,
        mask,
        # As the loop hands them over.
        task_ids=torch.tensor([1]).expand(3),
        sample_ids=torch.tensor([11, 12, 13]),
        noise_seed=5,
    )

    def forward() -> Tensor:
        with use_context(context), record_routing(), autocast(precision, device):
            out = layer(hidden)
        return out.float().square().mean()

    return Prepared(forward, (hidden, *layer.parameters()))


def layer_cases() -> dict[str, Case]:
    from moe_dist.moe.routers import ROUTERS

    found: dict[str, Case] = {}
    for precision in PRECISIONS:
        for router in ROUTERS:
            for top_k in (1, 2):
                found[f"layer {router}, top {top_k}, {precision}"] = partial(
                    layer_case, router, precision, top_k=top_k
                )
        for policy in ("position", "probability"):
            found[f"layer token_gate, capacity by {policy}, {precision}"] = partial(
                layer_case, "token_gate", precision, capacity_factor=0.75, drop_policy=policy
            )
        found[f"layer token_gate, jitter, {precision}"] = partial(
            layer_case, "token_gate", precision, gate_jitter=0.1
        )
        found[f"layer token_gate, no neurons, {precision}"] = partial(
            layer_case, "token_gate", precision, expert_size=0
        )
    found["layer token_gate, top 2, bf16" + OLDER] = partial(layer_case, "token_gate", "bf16")
    return found


class _Faulty(nn.Module):
    """A layer with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Multiply, and do the wrong thing beside it."""
        out_TD = hidden_TD * self.weight
        ids_T = torch.zeros(len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
        if self.fault == "tensor of the host":
            out_TD = out_TD + torch.ones(4)
        elif self.fault == "value":
            out_TD = out_TD * (1.0 if float(out_TD.sum()) > 0 else -1.0)
        elif self.fault == "list":
            out_TD = out_TD * len(ids_T.tolist())
        elif self.fault == "bincount":
            out_TD = out_TD * torch.bincount(ids_T, minlength=4)
        elif self.fault == "mask":
            out_TD = out_TD[ids_T == 0]
        elif self.fault == "index of the host":
            out_TD = out_TD[torch.zeros(3, dtype=torch.int64)]
        elif self.fault == "copy":
            out_TD = out_TD * torch.ones(4).to(out_TD.device)
        elif self.fault == "repeats":
            out_TD = out_TD.repeat_interleave(ids_T + 2, dim=0)
        elif self.fault == "backward":
            out_TD.register_hook(lambda gradient: gradient * float(gradient.sum() != 0))
        elif self.fault == "other values":
            out_TD = out_TD + (hidden_TD.device.type != "cpu")
        return out_TD


def _faulty_case(fault: str, device: torch.device) -> Prepared:
    layer = _Faulty(fault).to(device)
    hidden = torch.arange(12.0).view(3, 4).to(device)
    return Prepared(lambda: layer(hidden).sum(), (layer.weight,))


FAULTS: dict[str, tuple[int, int]] = {
    "none": (0, 0),
    "value": (1, 0),
    "list": (1, 0),
    "bincount": (1, 0),
    "mask": (1, 1),
    "index of the host": (1, 1),
    "copy": (1, 0),
    "repeats": (1, 0),
    "backward": (0, 1),
}
"""Deliberately wrong layers, and the waits that must be found in forward and backward."""
LOUD_FAULTS = {"tensor of the host": "WrongDeviceError", "other values": "is off by"}
"""Others, and what must be said of them."""


def faulty_cases() -> dict[str, Case]:
    """Name the cases that prove that a fault is found."""
    return {f"fault: {name}": partial(_faulty_case, name) for name in (*FAULTS, *LOUD_FAULTS)}
