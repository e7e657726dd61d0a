"""A tiny model with every kind of MoE layer, its data, and one way to train it at any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.distributed import TrainEngine, build_engine
from moe_dist.distributed.update import Precision
from moe_dist.moe import Experts, MoELayer, RoutingContext, build_router, use_context

VOCAB, WIDTH, LABELS, EXPERTS = 23, 8, 3, 4
SAMPLES = 12
LEARNING_RATE = 1e-2
NUM_STEPS = 10
# Below every gradient norm of the runs, so that clipping is always active.
CLIP = 0.05
ORDERS = {"gated": (3, 0, 2, 1), "hashed": (1, 2, 0, 3)}
"""Which experts are whose, where they are not held in the order of their numbers."""
# How one global batch is spread over ranks and micro-batches: never evenly.
SHARES = {1: [12], 2: [5, 7], 4: [2, 5, 3, 2]}


@dataclass(frozen=True)
class Case:
    """One way to run the same training."""

    world: int
    ep: int
    zero: int
    accumulation: int = 1
    clip: float = CLIP
    is_placed: bool = False

    @property
    def name(self) -> str:
        clipped = "clip" if self.clip else "free"
        placed = "-placed" if self.is_placed else ""
        return f"w{self.world}-ep{self.ep}-z{self.zero}-a{self.accumulation}-{clipped}{placed}"


class TinyMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.gated = MoELayer(
            Experts(EXPERTS, WIDTH, 6, activation="gelu"),
            build_router("token_gate", d_model=WIDTH, num_experts=EXPERTS, top_k=2),
            shared=Experts(1, WIDTH, 5, activation="gelu", bias_out=False),
            name="gated",
        )
        self.hashed = MoELayer(
            Experts(EXPERTS, WIDTH, 6, activation="relu", gated=True),
            build_router("hash_random", d_model=WIDTH, num_experts=EXPERTS, vocab_size=VOCAB),
            name="hashed",
        )
        self.head = nn.Linear(WIDTH, LABELS)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(WIDTH, 2)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        with use_context(RoutingContext(token_ids, mask)):
            hidden = self.norm(self.embedding(token_ids))
            hidden = hidden + self.gated(hidden)
            hidden = hidden + self.hashed(hidden) + self.frozen(hidden)
        lengths = mask.sum(1, keepdim=True)
        return self.head((hidden * mask.unsqueeze(-1)).sum(1) / lengths)


def make_model() -> TinyMoE:
    torch.manual_seed(7)
    return TinyMoE()


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of 1 to 9 tokens, their lengths and labels; alike on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    lengths = torch.randint(1, 10, (SAMPLES,), generator=generator)
    token_ids = torch.randint(0, VOCAB, (SAMPLES, 9), generator=generator)
    labels = torch.randint(0, LABELS, (SAMPLES,), generator=generator)
    return token_ids, lengths, labels


def micro_batches(case: Case, rank: int, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """This rank's (token_ids, mask, labels), each cut to its own longest sample."""
    token_ids, lengths, labels = global_batch(step)
    shares = SHARES[case.world]
    start = sum(shares[:rank])
    rows = torch.arange(start, start + shares[rank])
    cut = 1 if case.accumulation == 2 else len(rows)
    batches = []
    for part in (rows[:cut], rows[cut:]):
        if len(part):
            longest = int(lengths[part].max())
            mask = torch.arange(longest) < lengths[part].unsqueeze(1)
            batches.append((token_ids[part, :longest], mask, labels[part]))
    assert len(batches) == case.accumulation
    return batches


def make_engine(
    case: Case, precision: Precision = "fp32", model: nn.Module | None = None
) -> TrainEngine:
    return build_engine(
        make_model() if model is None else model,
        learning_rate=LEARNING_RATE,
        weight_decay=0.1,
        num_steps=NUM_STEPS,
        warmup_steps=3,
        # BERT's own. With 1e-8 AdamW turns the rounding of a gradient of 1e-8 into a whole step,
        # and no two orders of summation agree to 1e-5.
        eps=1e-6,
        expert_learning_rate_scale=2.0,
        zero_stage=case.zero,
        ep_size=case.ep,
        micro_batches_per_step=case.accumulation,
        precision=precision,
        max_grad_norm=case.clip,
        expert_orders=ORDERS if case.is_placed else None,
    )


def train_steps(engine: TrainEngine, case: Case, first: int, last: int) -> list[float]:
    """Train from step `first` up to `last` and return the gradient norms."""
    norms = []
    for step in range(first, last):
        batches = micro_batches(case, engine.rank, step)
        for index, (token_ids, mask, labels) in enumerate(batches):
            with engine.autocast():
                logits = engine.module(token_ids, mask)
            total = F.cross_entropy(logits.float(), labels, reduction="sum")
            loss = engine.world_size * total / SAMPLES
            engine.backward(loss, is_last_micro_batch=index == len(batches) - 1)
        norms.append(engine.step())
    return norms


@torch.no_grad()
def all_logits(engine: TrainEngine, case: Case) -> Tensor:
    """Logits of one whole global batch, each rank computing its own samples."""
    plain = Case(case.world, case.ep, case.zero)
    ((token_ids, mask, _),) = micro_batches(plain, engine.rank, 0)
    mine = engine.module(token_ids, mask)
    if engine.world_size == 1:
        return mine
    parts: list[Tensor | None] = [None] * engine.world_size
    dist.all_gather_object(parts, mine)
    return torch.cat([part for part in parts if part is not None])
