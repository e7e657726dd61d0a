"""Time training with two workers against two independent one-worker runs on the same machine.

The independent runs show what the machine can give: memory bandwidth and clock are shared, but
nothing is exchanged. Each of them takes the very batches of its twin in the pair, so that lengths
and padding are alike. The pair and the two loners live side by side and take turns, a few steps
each, so that a busy machine slows both alike. A step is the demo's: a frozen teacher, a sparse
student, forward, backward, update.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.families import find_slots
from moe_dist.data.loaders import TrainBatches
from moe_dist.distributed import TrainEngine, build_engine
from moe_dist.distributed.parameter_groups import moe_layers
from moe_dist.errors import ConfigError
from moe_dist.jobs.expert_groups import settle_expert_orders
from moe_dist.losses.total import CountKind, weighted_total
from moe_dist.training.step import distill_terms, freeze

from .importance import ImportanceBenchmark, build_model, draw_sentences
from .sizes import below_one

GOAL_RATIO = 0.85
TOGETHER, ALONE = "2 workers", "2 independent runs"
WEIGHTS = {"task": 1.0, "prediction_kl": 1.0, "hidden_mse": 1.0}


@dataclass(frozen=True)
class ThroughputBenchmark:
    """What to time. Defaults are the demo's sizes: 64 sentences a step over two workers.

    Args:
        batch_size: sentences of one worker in a step.
        num_steps: steps of one turn.
        num_repeats: turns that count, after one that does not.
        ep_size: 1 or 2.
        zero_stage: of the pair.
        sentences: model and lengths, as the importance benchmark draws them.
        num_experts: of the student.
        expert_size: neurons that each token uses.
        num_shared_neurons: of these, shared by all experts.
        skewed: gates that send most tokens to the second half of the experts.
        in_order: hold experts in the order of their numbers, whatever they have to do.
    """

    batch_size: int = 32
    num_steps: int = 4
    num_repeats: int = 5
    ep_size: int = 2
    zero_stage: int = 0
    sentences: ImportanceBenchmark = field(default_factory=ImportanceBenchmark)
    num_experts: int = 4
    expert_size: int = 384
    num_shared_neurons: int = 256
    skewed: bool = False
    in_order: bool = False


@dataclass(frozen=True)
class Throughput:
    """One line of the result.

    Args:
        way: "2 workers" or "2 independent runs".
        tokens_per_s: median over turns of the sum over both processes.
        step_ms: median over turns of the slower process's step.
        ratio: median over turns, to the independent runs of the same round.
    """

    way: str
    tokens_per_s: float
    step_ms: float
    ratio: float


def run(settings: ThroughputBenchmark | None = None) -> list[Throughput]:
    """Start all four processes, and let the pair and the loners take turns; the pair comes first.

    A ConfigError if a setting does not fit.
    """
    settings = ThroughputBenchmark() if settings is None else settings
    _check(settings)
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as name:
        turns = mp.get_context("spawn").Barrier(4)
        mp.spawn(_run_process, args=(settings, turns, Path(name)), nprocs=4)
        measured = [
            json.loads((Path(name) / f"{index}.json").read_text(encoding="utf-8"))
            for index in range(4)
        ]
    together, alone = _turn_rates(measured[:2]), _turn_rates(measured[2:])
    return [
        _line(TOGETHER, measured[:2], together, alone, settings.num_steps),
        _line(ALONE, measured[2:], alone, alone, settings.num_steps),
    ]


def to_table(lines: Sequence[Throughput], settings: ThroughputBenchmark) -> Table:
    """Lay the result out for the console."""
    table = Table(
        title=f"distillation steps, {settings.batch_size} sentences a worker, one thread each, "
        f"ep {settings.ep_size}, ZeRO {settings.zero_stage}"
    )
    table.add_column("way")
    for column in ("tokens/s", "ms a step", "ratio"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            line.way, f"{line.tokens_per_s:,.0f}", f"{line.step_ms:.0f}", f"{line.ratio:.3f}"
        )
    return table


def main(settings: ThroughputBenchmark | None = None) -> None:
    """Run the benchmark and print its table; what `moe-dist benchmark throughput` calls."""
    settings = ThroughputBenchmark() if settings is None else settings
    lines = run(settings)
    console = Console(highlight=False)
    console.print(to_table(lines, settings))
    verdict = "reached" if lines[0].ratio >= GOAL_RATIO else "missed"
    console.print(f"ratio {lines[0].ratio:.3f}; the goal of {GOAL_RATIO} is {verdict}")


def _check(settings: ThroughputBenchmark) -> None:
    faults = below_one(settings, "batch_size", "num_steps", "num_repeats")
    if settings.ep_size not in (1, 2):
        faults.append(f"ep_size is {settings.ep_size}; two workers take 1 or 2")
    if faults:
        raise ConfigError(faults, source="benchmark throughput")


def _turn_rates(pair: list[dict[str, list[float]]]) -> list[float]:
    """Add up the tokens per second of two processes, turn by turn."""
    rates = [
        [tokens / taken for tokens, taken in zip(one["tokens"], one["seconds"], strict=True)]
        for one in pair
    ]
    return [sum(turn) for turn in zip(*rates, strict=True)]


def _line(
    way: str,
    pair: list[dict[str, list[float]]],
    rates: list[float],
    base: list[float],
    num_steps: int,
) -> Throughput:
    slowest = [max(turn) for turn in zip(*(one["seconds"] for one in pair), strict=True)]
    return Throughput(
        way,
        statistics.median(rates),
        1e3 * statistics.median(slowest) / num_steps,
        statistics.median(rate / other for rate, other in zip(rates, base, strict=True)),
    )


def _run_process(
    index: int, settings: ThroughputBenchmark, turns: Barrier, directory: Path
) -> None:
    """Processes 0 and 1 are the pair, 2 and 3 train alone."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    paired = index < 2
    if paired:
        store = dist.FileStore(str(directory / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=index, world_size=2)
    steps = _Steps(settings, rank=index % 2, paired=paired)
    measured: dict[str, list[float]] = {"tokens": [], "seconds": []}
    for turn in range(-1, settings.num_repeats):
        for pairs_turn in (True, False):
            turns.wait()
            if pairs_turn != paired:
                continue
            started = time.perf_counter()
            tokens = sum(steps.take() for _ in range(settings.num_steps))
            if turn >= 0:
                measured["tokens"].append(tokens)
                measured["seconds"].append(time.perf_counter() - started)
    turns.wait()
    (directory / f"{index}.json").write_text(json.dumps(measured), encoding="utf-8")
    if paired:
        dist.destroy_process_group()


class _Steps:
    """The distillation steps of one process.

    Args:
        settings: what to train.
        rank: in the pair; a loner takes the batches of this rank too.
        paired: whether the process group trains, or this process alone.
    """

    def __init__(self, settings: ThroughputBenchmark, *, rank: int, paired: bool) -> None:
        dense: Any = build_model(settings.sentences)
        student = _make_student(dense, settings)
        self._terms = partial(distill_terms, teacher=freeze(dense))
        self._batches = TrainBatches(
            draw_sentences(dense, settings.sentences),
            batch_size=settings.batch_size * 2,
            world_size=2,
            rank=rank,
        )
        ep_size = settings.ep_size if paired else 1
        orders = settle_expert_orders(
            student,
            1 if settings.in_order else ep_size,
            self._batches.epoch(0),
            None,
            seed=0,
            precision="fp32",
            device=torch.device("cpu"),
        )
        self._engine: TrainEngine = build_engine(
            student,
            learning_rate=1e-4,
            weight_decay=0.01,
            num_steps=10_000,
            zero_stage=settings.zero_stage if paired else 0,
            ep_size=ep_size,
            expert_orders=orders,
        )
        self._engine.module.train()
        self._epoch = 0
        self._pending = self._batches.epoch(0)

    def take(self) -> int:
        """Take one step; returns this process's tokens."""
        batch = next(self._pending, None)
        if batch is None:
            self._epoch += 1
            self._pending = self._batches.epoch(self._epoch)
            batch = next(self._pending)
        counts: dict[CountKind, int] = {"samples": batch.num_samples, "tokens": batch.num_tokens}
        (samples,) = batch.micro_batches
        terms = self._terms(self._engine.module, batch=samples).terms
        total, _ = weighted_total(terms, WEIGHTS, counts)
        self._engine.backward(total * self._engine.world_size, is_last_micro_batch=True)
        self._engine.step()
        return int(samples["attention_mask"].sum())


def _make_student(dense: Any, settings: ThroughputBenchmark) -> Any:
    generator = torch.Generator().manual_seed(settings.sentences.seed)
    scores = [torch.rand(slot.num_neurons, generator=generator) for slot in find_slots(dense)]
    plan = plan_partition(
        scores,
        num_experts=settings.num_experts,
        expert_size=settings.expert_size,
        num_shared_neurons=settings.num_shared_neurons,
        tie_shared=True,
    )
    student = dense_to_moe(dense, plan, router="token_gate")
    for _, layer in moe_layers(student) if settings.skewed else ():
        # A score that varies more is more often the largest.
        with torch.no_grad():
            router: Any = layer.router
            router.gate.weight[settings.num_experts // 2 :] *= 4.0
    return student
