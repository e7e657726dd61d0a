"""What the ranks of `test_watchdog` do: a few steps, of which one goes wrong."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.distributed.position import TRAINING, advancing, begin_step, collective, enter_phase
from moe_dist.distributed.reduction import BackendReduction
from moe_dist.distributed.shared_reduction import SharedReduction
from moe_dist.workers.worker import run_worker

BAD_RANK = 1
BAD_STEP = 3


def run_rank(
    rank: int, world_size: int, directory: str, fault: str, step_timeout_s: float, shared: bool
) -> None:
    store = dist.FileStore(f"{directory}/store", world_size)
    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    config = {
        "work": job,
        "job": {"fault": fault, "step_timeout_s": step_timeout_s, "shared": shared},
        "records": directory,
        "num_threads": 1,
        "step_timeout_s": step_timeout_s,
    }
    run_worker(config)
    (Path(directory) / f"finished-{rank}").touch()


def job(payload: dict[str, Any]) -> None:
    world = dist.group.WORLD
    assert world is not None
    reduction = SharedReduction.over(world) if payload["shared"] else BackendReduction(world)
    assert reduction is not None
    enter_phase(TRAINING)
    for step in range(1, BAD_STEP + 1):
        begin_step(step)
        if step == BAD_STEP and dist.get_rank() == BAD_RANK:
            FAULTS[payload["fault"]](payload["step_timeout_s"])
        with collective("sum of gradients"):
            reduction.average([torch.ones(3)], 1)
    enter_phase("evaluation")
    # A batch takes longer than a step may, on one rank, and the other waits for it.
    for _ in advancing(range(2)):
        if dist.get_rank() == BAD_RANK:
            time.sleep(1.5 * payload["step_timeout_s"])
    with collective("sum over ranks"):
        dist.all_reduce(torch.ones(3))


def _sleep(step_timeout_s: float) -> None:
    time.sleep(1000)


def _stop(step_timeout_s: float) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _die(step_timeout_s: float) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _jump_clock(step_timeout_s: float) -> None:
    time.time = lambda: 0.0  # type: ignore[assignment]


FAULTS = {"sleeps": _sleep, "is stopped": _stop, "dies": _die, "clock jumps": _jump_clock}
