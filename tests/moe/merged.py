"""Small merged layers, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_dist.moe import Experts, MergedLayer, RoutingContext, build_router, use_context

D_MODEL, EXPERT_SIZE, NUM_EXPERTS, NUM_TASKS = 12, 8, 6, 3
MERGED = ("merged_task", "merged_sequence", "merged_token")


def merged_layer(
    router: str = "merged_sequence",
    *,
    top_k: int = 2,
    gated: bool = False,
    biases: bool = True,
    num_shared: int = 0,
    expert_size: int = EXPERT_SIZE,
    num_experts: int = NUM_EXPERTS,
    drawn: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> MergedLayer:
    """Make a layer whose gates, which start at zero, tell inputs apart where `drawn`."""
    torch.manual_seed(0)

    def experts(number: int, size: int, bias_out: bool) -> Experts:
        return Experts(
            number,
            D_MODEL,
            size,
            activation="gelu",
            gated=gated,
            bias_in=biases,
            bias_out=bias_out,
        )

    gate = build_router(
        router,
        d_model=D_MODEL,
        num_experts=num_experts,
        top_k=top_k,
        num_tasks=NUM_TASKS,
        gated=gated,
        seed=3,
        **options,
    )
    shared = experts(1, num_shared, False) if num_shared else None
    layer = MergedLayer(
        experts(num_experts, expert_size, biases), gate, shared=shared, name="layer"
    )
    if drawn:
        draw_gates(layer)
    return layer.to(dtype).eval()


def draw_gates(layer: nn.Module, *names: str) -> None:
    """Give what starts at zero random values: the gates, or linear layers of these names alone."""
    generator = torch.Generator().manual_seed(5)
    for name, value in layer.named_parameters():
        if name.rpartition(".")[0].rpartition(".")[2] in (names or ("gate", "noise", "up")):
            with torch.no_grad():
                value.copy_(torch.randn(value.shape, generator=generator))


def batch(
    lengths: tuple[int, ...] = (5, 3, 4), *, left: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, RoutingContext]:
    """Make (B, S, D) hidden states of sequences, padded to the longest, and their context."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    hidden = torch.randn(len(lengths), longest, D_MODEL, generator=generator).to(dtype)
    places = torch.arange(longest)
    ends = torch.tensor(lengths).unsqueeze(1)
    mask = places >= longest - ends if left else places < ends
    return hidden, RoutingContext(mask=mask, task_ids=torch.arange(len(lengths)) % NUM_TASKS)


def gradients_of(
    layer: MergedLayer, forward: Callable[[Tensor], Tensor], hidden: Tensor, context: RoutingContext
) -> list[Tensor]:
    """Give the output and the gradients of input and parameters of a weighted sum of it."""
    hidden = hidden.detach().requires_grad_()
    wanted = [hidden, *layer.parameters()]
    with use_context(context):
        out = forward(hidden)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
    return [
        out.detach(),
        *(
            torch.zeros_like(value) if grad is None else grad
            for grad, value in zip(grads, wanted, strict=True)
        ),
    ]
