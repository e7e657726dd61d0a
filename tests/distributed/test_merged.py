"""Merged experts on several ranks: by task as on one, by sequence refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dist.distributed import build_engine, spawn_gloo
from moe_dist.distributed.deepspeed_runtime import start_deepspeed
from moe_dist.errors import ConfigError, MissingInputError
from moe_dist.moe import Experts, MergedLayer, RoutingContext, build_router, use_context
from moe_dist.moe.reference import reference_merge
from tests.distributed.gaps import largest_gap, oracle_of
from tests.moe.merged import draw_gates

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

VOCAB, WIDTH, EXPERTS, TASKS = 23, 8, 4, 3


class OneLayer(nn.Module):
    """Embedding, a merged layer with shared neurons, and a head on the mean."""

    def __init__(
        self, router: str = "merged_task", *, gated: bool = False, kind: type = MergedLayer
    ) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        gate = build_router(
            router,
            d_model=WIDTH,
            num_experts=EXPERTS,
            top_k=2,
            num_tasks=TASKS,
            gated=gated,
        )
        self.moe = kind(
            Experts(EXPERTS, WIDTH, 6, activation="gelu", gated=gated),
            gate,
            shared=Experts(1, WIDTH, 5, activation="gelu", gated=gated, bias_out=False),
            name="moe",
        )
        draw_gates(self.moe)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, context: RoutingContext) -> Tensor:
        assert context.token_ids is not None
        assert context.mask is not None
        with use_context(context):
            hidden = self.embedding(context.token_ids)
            hidden = hidden + self.moe(hidden)
        mask = context.mask.unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def batch(rank: int, step: int) -> RoutingContext:
    """Another number of sentences, tokens and tasks on each rank and in each step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    shape = (3 - rank, 6 - rank)
    lengths = torch.randint(1, shape[1] + 1, (shape[0],), generator=generator)
    return RoutingContext(
        torch.randint(VOCAB, shape, generator=generator),
        torch.arange(shape[1]) < lengths.unsqueeze(1),
        torch.randint(TASKS, (shape[0],), generator=generator),
        noise_seed=step,
    )


def gap_to_oracle(rank: int, world: int, gated: bool, training: bool, ep: int) -> float:
    whole, spread = (OneLayer(gated=gated).train(training) for _ in range(2))
    outputs, wanted = oracle_of(whole, reference_merge, [batch(one, 0) for one in range(world)])
    return largest_gap(spread, batch(rank, 0), outputs[rank], wanted, ep)


def losses(context_of: Any, engine: Any, ranks: range) -> list[float]:
    """Train ten steps on the samples of some ranks' batches; gives the gradient norms."""
    norms = []
    for step in range(10):
        contexts = [context_of(rank, step) for rank in ranks]
        count = sum(len(context_of(rank, step).task_ids) for rank in range(2))
        for index, context in enumerate(contexts):
            labels = context.token_ids[:, 0] % 2
            total = nn.functional.cross_entropy(engine.module(context), labels, reduction="sum")
            loss = engine.world_size * total / count
            engine.backward(loss, is_last_micro_batch=index == len(contexts) - 1)
        norms.append(engine.step())
    return norms


def engine_of(ep_size: int, zero_stage: int, micro_batches: int) -> Any:
    return build_engine(
        OneLayer(),
        learning_rate=1e-2,
        weight_decay=0.0,
        num_steps=10,
        warmup_steps=2,
        eps=1e-6,
        ep_size=ep_size,
        zero_stage=zero_stage,
        micro_batches_per_step=micro_batches,
        precision="fp32",
    )


def refused(router: str, kind: type, training: bool = False) -> str:
    from moe_dist.distributed.expert_parallel import parallelize_experts

    model = OneLayer(router, kind=kind).train(training)
    try:
        parallelize_experts(model, 2)
        model.moe.set_deepspeed_parallelism()
        with use_context(replace(batch(0, 0), noise_seed=None)):
            model.moe(torch.zeros(3, 6, WIDTH))
    except (ConfigError, MissingInputError) as error:
        return str(error)
    return ""


class AnotherLayer(MergedLayer):
    """A layer that combines in some way that nobody has spread."""


def run_all(rank: int, world: int, out: Path) -> None:
    warnings.filterwarnings("ignore")
    start_deepspeed()
    found: dict[str, Any] = {
        f"{gated}-{training}-ep{ep}": gap_to_oracle(rank, world, gated, training, ep)
        for gated in (False, True)
        for training in (False, True)
        for ep in (1, 2)
    }
    (out / f"gaps-{rank}.json").write_text(json.dumps(found))
    refusals = {
        router: refused(router, MergedLayer) for router in ("merged_sequence", "merged_token")
    }
    refusals["unknown"] = refused("merged_task", AnotherLayer)
    refusals["noise"] = refused("merged_task", MergedLayer, training=True)
    (out / f"refusals-{rank}.json").write_text(json.dumps(refusals))
    norms = {
        f"ep{ep}-zero{zero}": losses(batch, engine_of(ep, zero, 1), range(rank, rank + 1))
        for ep, zero in ((1, 0), (2, 0), (2, 1))
    }
    (out / f"norms-{rank}.json").write_text(json.dumps(norms))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged")
    spawn_gloo(run_all, 2, out)
    return out


@pytest.mark.parametrize("rank", [0, 1])
def test_outputs_and_gradients_equal_the_oracle(rank: int, results: Path) -> None:
    gaps = json.loads((results / f"gaps-{rank}.json").read_text())
    assert len(gaps) == 8
    assert not {name: gap for name, gap in gaps.items() if not gap <= 1e-5}


@pytest.mark.parametrize("rank", [0, 1])
def test_ten_steps_are_those_of_one_process(rank: int, results: Path) -> None:
    alone = losses(batch, engine_of(1, 0, 2), range(2))
    for name, norms in json.loads((results / f"norms-{rank}.json").read_text()).items():
        assert norms == pytest.approx(alone, rel=1e-4), name


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_spread_is_refused(rank: int, results: Path) -> None:
    refusals = json.loads((results / f"refusals-{rank}.json").read_text())
    for router in ("merged_sequence", "merged_token"):
        assert "merged anew for each sequence" in refusals[router]
        assert "set parallel.ep_size to 1" in refusals[router]
    assert "experts of AnotherLayer are spread over ranks is not known" in refusals["unknown"]
    assert "same noise on all of them" in refusals["noise"]
