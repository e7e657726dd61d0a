"""One process, micro-batches and two ranks take the same steps: router losses, noise, jitter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_dist.distributed.engine import build_engine
from moe_dist.distributed.gathering import gather_moments, gather_state_dict
from moe_dist.distributed.launch import spawn_gloo
from moe_dist.losses.total import LossWeight
from moe_dist.metric_log import MetricLog
from moe_dist.moe.gates import Gate
from moe_dist.moe.merge_gates import NoisyTopK
from moe_dist.training.loop import LoopSettings, train
from moe_dist.training.step import distill_terms
from tests.training.tiny import tiny_batches, tiny_bert, tiny_student

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TOLERANCE = 1e-5
NUM_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """A student's router and what is asked of it."""

    router: str
    gate: dict[str, float] = field(default_factory=dict)
    terms: dict[str, bool] = field(default_factory=dict)
    top_k: int = 1
    ep_size: int = 2


SETTINGS = {
    "balance": Setting("token_gate", terms={"load_balancing": True}),
    "balance of two experts": Setting("token_gate", terms={"load_balancing": True}, top_k=2),
    "balance of sentences": Setting("sentence_gate", terms={"load_balancing": True}),
    "balance of merged sequences": Setting(
        "merged_sequence", terms={"load_balancing": True}, top_k=2, ep_size=1
    ),
    "balance of merged tasks": Setting("merged_task", terms={"load_balancing": True}, top_k=2),
    "z-loss and entropy": Setting("token_gate", terms={"z_loss": True, "entropy": True}),
    "noise": Setting("token_gate", gate={"gate_noise": 0.5}),
    "noise on sentences": Setting("sentence_gate", gate={"gate_noise": 0.5}),
    "noise on a task": Setting("task_gate", gate={"gate_noise": 0.5}),
    "jitter": Setting("token_gate", gate={"gate_jitter": 0.5}),
    "jitter on sentences": Setting("sentence_gate", gate={"gate_jitter": 0.5}),
    "all": Setting(
        "token_gate",
        gate={"gate_noise": 0.5, "gate_jitter": 0.5},
        terms={"load_balancing": True, "z_loss": True, "entropy": True},
    ),
}
WEIGHTS = {
    "task": LossWeight(1.0),
    "load_balancing": LossWeight(2.0),
    "z_loss": LossWeight(0.5),
    "router_entropy": LossWeight(0.5),
}


def run(
    setting: Setting,
    out: Path,
    *,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    ep_size: int = 1,
    recompute: bool = False,
) -> None:
    """Train some steps; keep the first one's moments, the last weights and the logged losses."""
    teacher = tiny_bert(dropout=0.0)
    student = tiny_student(
        teacher, router=setting.router, top_k=setting.top_k, num_tasks=1, **setting.gate
    )
    spread_gates(student)
    if recompute:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    engine = build_engine(
        student,
        learning_rate=1e-2,
        weight_decay=0.0,
        num_steps=NUM_STEPS,
        eps=1e-3,
        ep_size=ep_size,
        micro_batches_per_step=accumulation,
        max_grad_norm=0.0,
    )
    found: dict[str, Tensor] = {}

    def after_step(num_samples: int) -> dict[str, float]:
        if engine.steps_done == 1:
            found.update({f"first.{k}": v for k, v in gather_moments(engine).items()})
        return {}

    log = MetricLog(out.with_suffix(".jsonl")) if rank == 0 else None
    train(
        engine,
        tiny_batches(accumulation=accumulation, rank=rank, world_size=world),
        lambda model, batch: distill_terms(model, model, batch, objectives=(), **setting.terms),
        WEIGHTS,
        settings=LoopSettings(num_steps=NUM_STEPS, seed=3, log_every=1),
        metric_log=log,
        after_step=after_step,
    )
    found |= {f"last.{name}": value for name, value in gather_state_dict(engine).items()}
    if rank == 0:
        save_file({name: value.contiguous() for name, value in found.items()}, out)


def spread_gates(student: Any) -> None:
    """Scores far apart, so that load is uneven and each choice is certain at any rounding."""
    generator = torch.Generator().manual_seed(5)
    for module in student.modules():
        if isinstance(module, Gate | NoisyTopK):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, generator=generator)


def run_ranks(rank: int, world: int, directory: Path) -> None:
    for name, setting in SETTINGS.items():
        for accumulation, ep_size in ((1, 1), (2, setting.ep_size)):
            out = directory / f"{name}-{world}-{accumulation}.safetensors"
            run(setting, out, accumulation=accumulation, rank=rank, world=world, ep_size=ep_size)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks once for all settings, since starting them costs seconds."""
    directory = tmp_path_factory.mktemp("same-steps")
    spawn_gloo(run_ranks, 2, directory)
    return directory


def assert_same(found: Path, wanted: Path) -> None:
    tensors, oracle = load_file(found), load_file(wanted)
    assert tensors.keys() == oracle.keys()
    assert any(name.startswith("first.exp_avg.") for name in tensors)
    for name, value in oracle.items():
        scale = max(1e-3, float(value.abs().max()))
        gap = float((tensors[name] - value).abs().max()) / scale
        assert gap <= TOLERANCE, f"{name}: {gap:.2g}"
    logs = [MetricLog(path.with_suffix(".jsonl")).read() for path in (found, wanted)]
    losses = [
        [(r.step, {n: v for n, v in r.metrics.items() if "loss/" in n}) for r in log]
        for log in logs
    ]
    for (step, own), (_, other) in zip(*losses, strict=True):
        assert own == pytest.approx(other, rel=1e-4), step


@pytest.mark.parametrize("name", SETTINGS)
def test_every_split_of_a_step_gives_the_same_gradients(results: Path, name: str) -> None:
    whole = results / f"{name}-1-1.safetensors"
    run(SETTINGS[name], whole)
    for accumulation in (2, 4):
        split = results / f"{name}-1-{accumulation}.safetensors"
        run(SETTINGS[name], split, accumulation=accumulation)
        assert_same(split, whole)
    for accumulation in (1, 2):
        assert_same(results / f"{name}-2-{accumulation}.safetensors", whole)


@pytest.mark.parametrize("name", ["balance", "noise", "jitter", "all"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_recomputation_repeats_the_step(tmp_path: Path, name: str, accumulation: int) -> None:
    run(SETTINGS[name], tmp_path / "plain.safetensors", accumulation=accumulation)
    recomputed = tmp_path / "recomputed.safetensors"
    run(SETTINGS[name], recomputed, accumulation=accumulation, recompute=True)
    assert_same(recomputed, tmp_path / "plain.safetensors")


@pytest.mark.parametrize("name", ["noise", "jitter"])
def test_what_is_drawn_matters(tmp_path: Path, name: str) -> None:
    """Otherwise the tests above would pass with gates that draw nothing."""
    setting = SETTINGS[name]
    run(setting, tmp_path / "drawn.safetensors")
    run(Setting(setting.router), tmp_path / "plain.safetensors")
    drawn, plain = (load_file(tmp_path / f"{n}.safetensors") for n in ("drawn", "plain"))
    assert any(not torch.allclose(drawn[n], plain[n], atol=1e-3) for n in plain)
