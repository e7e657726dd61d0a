"""Time what a checkpoint costs the training that goes on beside it.

A student of MiniLM's size, of random weights, trains on sentences of equal length, on one worker
and on two with the experts spread over them. The step is the student's own, without a teacher's
forward, so that the budget is smaller here, and the share larger, than in a distillation.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_dist.distributed import CheckpointWriter, TrainEngine, build_engine, spawn_gloo
from moe_dist.errors import ConfigError

from .models import random_classifier

GOAL_SHARE = 0.05


@dataclass(frozen=True)
class CheckpointBenchmark:
    """What to time. Defaults are a student of MiniLM's 22.7M parameters and SST-2's recipe.

    Args:
        num_workers: of each run; with more than one, ep_size is as large and the ZeRO stage 1.
        checkpoint_every: steps of the budget that a checkpoint is measured against.
        num_checkpoints: of each run; the medians count.
        num_steps: timed after each checkpoint, while it is written; as many before the first.
        batch_size: sentences of one step, over all workers.
        num_tokens: of each sentence.
        directory: where checkpoints are written, on the disk to be measured; None for the
            system's temporary directory.
        d_model: width of the model.
        num_layers: its layers.
        num_neurons: of each FFN, a sixth of which is shared and the rest dealt to 4 experts.
        vocab_size: token embeddings of the model.
    """

    num_workers: tuple[int, ...] = (1, 2)
    checkpoint_every: int = 250
    num_checkpoints: int = 5
    num_steps: int = 4
    batch_size: int = 64
    num_tokens: int = 27
    directory: Path | None = None
    d_model: int = 384
    num_layers: int = 6
    num_neurons: int = 1536
    vocab_size: int = 30_522


@dataclass(frozen=True)
class CheckpointCost:
    """What one run's checkpoints cost, medians in seconds.

    Args:
        num_workers: processes.
        num_parameters: of the whole student.
        step_s: a step while nothing is written.
        stall_s: for which a checkpoint holds training up.
        slowed_s: that the steps beside a write lose to it.
        write_s: from the start of a write to its end, in the background.
        megabytes: of one checkpoint, in 10^6 bytes.
    """

    num_workers: int
    num_parameters: int
    step_s: float
    stall_s: float
    slowed_s: float
    write_s: float
    megabytes: float

    def share(self, checkpoint_every: int) -> float:
        """Return the part of the time that checkpoints cost, one every `checkpoint_every` steps."""
        return (self.stall_s + max(0.0, self.slowed_s)) / (checkpoint_every * self.step_s)


def run(settings: CheckpointBenchmark | None = None) -> list[CheckpointCost]:
    """Train and save in processes of one thread each; a ConfigError if a size is not positive."""
    settings = CheckpointBenchmark() if settings is None else settings
    _check(settings)
    costs = []
    for num_workers in settings.num_workers:
        with tempfile.TemporaryDirectory(prefix="moe-dist-", dir=settings.directory) as directory:
            spawn_gloo(_measure, num_workers, settings, Path(directory))
            found = json.loads((Path(directory) / "cost.json").read_text(encoding="utf-8"))
            costs.append(CheckpointCost(**found))
    return costs


def to_table(costs: list[CheckpointCost], settings: CheckpointBenchmark) -> Table:
    """Lay the costs out for a terminal."""
    table = Table(
        title=f"Checkpoints of a student of {costs[0].num_parameters / 1e6:.1f}M parameters, "
        f"{settings.batch_size} sentences of {settings.num_tokens} tokens a step",
        caption=f"share: stall and slowing over {settings.checkpoint_every} steps",
    )
    for column in ("workers", "step s", "stall s", "slowing s", "write s", "MB", "share"):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(
            str(cost.num_workers),
            f"{cost.step_s:.3f}",
            f"{cost.stall_s:.3f}",
            f"{cost.slowed_s:.3f}",
            f"{cost.write_s:.3f}",
            f"{cost.megabytes:.0f}",
            f"{cost.share(settings.checkpoint_every):.3%}",
        )
    return table


def main(settings: CheckpointBenchmark | None = None) -> None:
    """Run the benchmark and print its table; what `moe-dist benchmark checkpoint` calls."""
    settings = CheckpointBenchmark() if settings is None else settings
    costs = run(settings)
    console = Console(highlight=False)
    console.print(to_table(costs, settings))
    worst = max(cost.share(settings.checkpoint_every) for cost in costs)
    verdict = "kept" if worst <= GOAL_SHARE else "missed"
    console.print(f"worst share {worst:.3%}; the goal of at most {GOAL_SHARE:.0%} is {verdict}")


def _check(settings: CheckpointBenchmark) -> None:
    sizes = asdict(settings) | {"num_workers": min(settings.num_workers, default=0)}
    faults = [
        f"{name} is {size}; it must be at least 1"
        for name, size in sizes.items()
        if isinstance(size, int) and size < 1
    ]
    faults += [
        f"batch_size {settings.batch_size} is less than {count} workers"
        for count in settings.num_workers
        if count > settings.batch_size
    ]
    if faults:
        raise ConfigError(faults, source="benchmark checkpoint")


def _measure(rank: int, world_size: int, settings: CheckpointBenchmark, directory: Path) -> None:
    model = _student(settings)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    total = settings.num_steps * (settings.num_checkpoints + 2)
    engine = build_engine(
        model,
        learning_rate=1e-4,
        weight_decay=0.01,
        num_steps=total,
        ep_size=world_size,
        zero_stage=1 if world_size > 1 else 0,
    )
    engine.module.train()
    batch = _batch(settings, rank, world_size)
    steps = range(settings.num_steps)
    for _ in steps:
        _step(engine, batch, settings)
    step_s = statistics.median([_step(engine, batch, settings) for _ in steps])
    stalls, writes, slowed = [], [], []
    with CheckpointWriter(directory / "checkpoints", engine) as writer:
        for number in range(settings.num_checkpoints):
            stalls.append(writer.save(number, {}))
            beside = [_step(engine, batch, settings) for _ in steps]
            slowed.append(sum(beside) - len(beside) * step_s)
            writer.wait()
            writes.append(writer.write_s or 0.0)
    if rank == 0:
        newest = directory / "checkpoints" / f"step-{settings.num_checkpoints - 1:08d}"
        cost = CheckpointCost(
            num_workers=world_size,
            num_parameters=num_parameters,
            step_s=step_s,
            stall_s=statistics.median(stalls),
            slowed_s=statistics.median(slowed),
            write_s=statistics.median(writes),
            megabytes=sum(path.stat().st_size for path in newest.iterdir()) / 1e6,
        )
        (directory / "cost.json").write_text(json.dumps(asdict(cost)), encoding="utf-8")


def _student(settings: CheckpointBenchmark) -> Any:
    from moe_dist.conversion import dense_to_moe, plan_partition

    torch.manual_seed(0)
    dense = random_classifier(
        vocab_size=settings.vocab_size,
        d_model=settings.d_model,
        num_layers=settings.num_layers,
        num_neurons=settings.num_neurons,
    )
    shared = settings.num_neurons // 6
    plan = plan_partition(
        [torch.rand(settings.num_neurons) for _ in range(settings.num_layers)],
        num_experts=4,
        expert_size=shared + (settings.num_neurons - shared) // 4,
        num_shared_neurons=shared,
        tie_shared=True,
    )
    return dense_to_moe(dense, plan, router="token_gate")


def _batch(settings: CheckpointBenchmark, rank: int, world_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    mine = len(range(rank, settings.batch_size, world_size))
    shape = (mine, settings.num_tokens)
    return {
        "input_ids": torch.randint(settings.vocab_size, shape, generator=generator),
        "labels": torch.randint(2, (mine,), generator=generator),
    }


def _step(engine: TrainEngine, batch: dict[str, Tensor], settings: CheckpointBenchmark) -> float:
    started = time.perf_counter()
    logits = engine.module(input_ids=batch["input_ids"].to(engine.device)).logits
    labels = batch["labels"].to(engine.device)
    loss = F.cross_entropy(logits, labels, reduction="sum") / settings.batch_size
    engine.backward(loss * engine.world_size, is_last_micro_batch=True)
    engine.step()
    return time.perf_counter() - started
