"""Every router at expert parallel size 1 and 2 equals the slow oracle, and trains on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dist.distributed import build_engine, spawn_gloo
from moe_dist.distributed.deepspeed_runtime import start_deepspeed
from moe_dist.moe import (
    ROUTERS,
    Capacity,
    Experts,
    MoELayer,
    RoutingContext,
    build_router,
    use_context,
)
from moe_dist.moe.capacity import DROP_POLICIES
from moe_dist.moe.reference import reference_layer
from moe_dist.router_spec import ROUTER_FACTS
from tests.distributed.gaps import largest_gap, oracle_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

SENDERS = [name for name in ROUTERS if not ROUTER_FACTS[name].merges]
VOCAB, WIDTH, EXPERTS, TASKS = 23, 8, 4, 2
LIMITS: dict[str, Capacity | None] = {
    "dropless": None,
    **{policy: Capacity(0.7, policy) for policy in DROP_POLICIES},
}


class OneLayer(nn.Module):
    """Embedding, one MoE layer with shared neurons, and a head on the mean."""

    def __init__(self, router: str, top_k: int, limit: str, *, noise: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.moe = MoELayer(
            Experts(EXPERTS, WIDTH, 6, activation="gelu"),
            build_router(
                router,
                d_model=WIDTH,
                num_experts=EXPERTS,
                top_k=top_k,
                vocab_size=VOCAB,
                token_counts=torch.arange(VOCAB),
                num_tasks=TASKS,
                gate_noise=noise,
            ),
            shared=Experts(1, WIDTH, 5, activation="gelu", bias_out=False),
            name="moe",
            capacity=LIMITS[limit],
        )
        for name, parameter in self.moe.router.named_parameters():
            if name == "gate.weight":
                nn.init.normal_(parameter)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, context: RoutingContext) -> Tensor:
        with use_context(context):
            hidden = self.embedding(context.token_ids)
            hidden = hidden + self.moe(hidden)
        mask = context.mask.unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def batch(rank: int, step: int) -> RoutingContext:
    """Another number of sentences and tokens on each rank and in each step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    shape = (3 + rank, 6 - rank)
    lengths = torch.randint(1, shape[1] + 1, (shape[0],), generator=generator)
    return RoutingContext(
        torch.randint(VOCAB, shape, generator=generator),
        torch.arange(shape[1]) < lengths.unsqueeze(1),
        torch.randint(TASKS, (shape[0],), generator=generator),
    )


def gap_to_oracle(rank: int, world: int, router: str, top_k: int, limit: str, ep: int) -> float:
    """Against one token at a time."""
    whole, spread = (OneLayer(router, top_k, limit) for _ in range(2))
    outputs, wanted = oracle_of(whole, reference_layer, [batch(one, 0) for one in range(world)])
    return largest_gap(spread, batch(rank, 0), outputs[rank], wanted, ep)


def compare_all(rank: int, world: int, out: Path) -> None:
    warnings.filterwarnings("ignore")
    start_deepspeed()
    gaps = {
        f"{router}-{top_k}-{limit}-ep{ep}": gap_to_oracle(rank, world, router, top_k, limit, ep)
        for router in SENDERS
        for top_k in (1, 2)
        for limit in LIMITS
        for ep in (1, 2)
    }
    (out / f"gaps-{rank}.json").write_text(json.dumps(gaps))


def test_outputs_and_gradients_equal_the_oracle(tmp_path: Path) -> None:
    spawn_gloo(compare_all, 2, tmp_path)
    for rank in range(2):
        gaps: dict[str, Any] = json.loads((tmp_path / f"gaps-{rank}.json").read_text())
        assert len(gaps) == len(SENDERS) * 2 * len(LIMITS) * 2
        assert not {name: gap for name, gap in gaps.items() if not gap <= 1e-5}


def train_all(rank: int, world: int, out: Path) -> None:
    warnings.filterwarnings("ignore")
    worst = {
        f"{router}-{limit}": train(rank, world, router, limit)
        for router in SENDERS
        for limit in ("dropless", "probability")
    }
    (out / f"trained-{rank}.json").write_text(json.dumps(worst))


def train(rank: int, world: int, router: str, limit: str) -> bool:
    """200 steps with noisy gates and a learning rate that would show an overflow."""
    engine = build_engine(
        OneLayer(router, 1, limit, noise=0.5),
        learning_rate=1e-2,
        weight_decay=0.0,
        num_steps=200,
        warmup_steps=10,
        ep_size=2,
        zero_stage=1,
        precision="fp32",
    )
    finite = True
    for step in range(200):
        context = batch(rank, step)
        labels = context.token_ids[:, 0] % 2
        loss = nn.functional.cross_entropy(engine.module(context), labels)
        engine.backward(loss, is_last_micro_batch=True)
        norm = engine.step()
        finite = finite and bool(torch.isfinite(loss)) and norm == norm and norm < float("inf")
    return finite and all(bool(p.isfinite().all()) for p in engine.module.parameters())


@pytest.mark.slow
def test_every_router_trains_200_steps_without_a_non_finite_value(tmp_path: Path) -> None:
    spawn_gloo(train_all, 2, tmp_path)
    for rank in range(2):
        finite = json.loads((tmp_path / f"trained-{rank}.json").read_text())
        assert len(finite) == len(SENDERS) * 2
        assert all(finite.values()), finite
