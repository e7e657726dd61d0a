"""What a training loop needs of an engine, and the engine of one process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.expert_placement import Order
from moe_dist.distributed.launch import ensure_process_group, training_device
from moe_dist.distributed.moments import read_plain_moments, write_plain_moments
from moe_dist.distributed.parameter_groups import build_adamw, parameter_groups
from moe_dist.distributed.schedule import LearningRateSchedule, ScheduleKind
from moe_dist.distributed.scheduled_engine import ScheduledEngine
from moe_dist.distributed.update import (
    Precision,
    checked_norm,
    clipped,
    fill_missing_gradients,
    set_rates,
)
from moe_dist.errors import ConfigError


class TrainEngine(Protocol):
    """Forward and update of one model, alike in one process and in many.

    The loss that a rank hands to `backward` is `world_size * (its own sum) / (global count)`,
    where the count covers all ranks and all micro-batches of the step. Gradients are summed over
    micro-batches and averaged over ranks, so they are those of the mean over the global batch.
    """

    module: nn.Module
    device: torch.device
    rank: int
    world_size: int
    ep_size: int
    zero_stage: int
    steps_done: int

    @property
    def learning_rate(self) -> float:
        """Rate of the next step, for parameters that are not routed experts."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """Context for the forward pass in the engine's precision."""
        ...

    def backward(self, loss: Tensor, *, is_last_micro_batch: bool) -> None:
        """Add a micro-batch's gradients."""
        ...

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the norm before clipping."""
        ...

    def read_moments(self) -> dict[str, Tensor]:
        """Optimizer moments, at least on the first rank that holds a parameter; collective."""
        ...

    def write_moments(self, moments: Mapping[str, Tensor] | None, steps: int) -> None:
        """Set moments and step count, and adopt the module's present weights."""
        ...


class LocalEngine(ScheduledEngine):
    """Plain torch in one process; the oracle that the distributed engine is tested against."""

    rank = 0
    world_size = 1
    ep_size = 1
    zero_stage = 0

    def backward(self, loss: Tensor, *, is_last_micro_batch: bool) -> None:
        """Add a micro-batch's gradients; one process need not know the last one."""
        del is_last_micro_batch
        loss.backward()

    def step(self) -> float:
        """Clip, update and clear the gradients; give the global norm before clipping."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        fill_missing_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = checked_norm(float(torch.nn.utils.get_total_norm(gradients)), self.steps_done)
        set_rates(self.optimizer, self._schedule.factor(self.steps_done))
        with clipped(self.optimizer, gradients, norm, self._max_grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return norm

    def read_moments(self) -> dict[str, Tensor]:
        """Return `exp_avg.<name>` and `exp_avg_sq.<name>`; empty before the first step."""
        return read_plain_moments(self.module, self.optimizer)

    def write_moments(self, moments: Mapping[str, Tensor] | None, steps: int) -> None:
        """Set the optimizer moments; None leaves the optimizer fresh."""
        self.steps_done = steps
        if moments is not None:
            write_plain_moments(self.module, self.optimizer, moments, steps)


def build_engine(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    num_steps: int,
    warmup_steps: int = 0,
    lr_schedule: ScheduleKind = "linear",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    expert_learning_rate_scale: float = 1.0,
    zero_stage: int = 0,
    ep_size: int = 1,
    precision: Precision = "fp32",
    micro_batches_per_step: int = 1,
    max_grad_norm: float = 1.0,
    device: torch.device | None = None,
    expert_orders: Mapping[str, Order] | None = None,
) -> TrainEngine:
    """Return the engine that fits where this process runs.

    One process without ZeRO or expert parallelism trains in plain torch; anything else goes
    through DeepSpeed on the process group that stands (all ranks call this together, with models
    that start alike). The model is changed in place: moved, and cut to this rank's experts.

    Args:
        model: a whole model.
        learning_rate: peak rate.
        weight_decay: decoupled; biases and norms are not decayed.
        num_steps: optimizer steps of the whole run.
        warmup_steps: of linear warm-up.
        lr_schedule: "linear" decay to zero or "constant".
        betas: of AdamW.
        eps: of AdamW.
        expert_learning_rate_scale: factor on the rate of routed experts.
        zero_stage: 0, 1 or 2.
        ep_size: ranks that share one set of experts.
        precision: "fp32" or "bf16" (autocast over fp32 weights).
        micro_batches_per_step: accumulation; micro-batches are summed.
        max_grad_norm: global norm to clip to; 0 for none.
        device: where to train; where this process can, if not given.
        expert_orders: by dotted name of a layer, which ranks hold which experts; see
            `expert_placement`. Consecutive ones if not given.

    Returns:
        A `TrainEngine`.

    Raises:
        ConfigError: listing what cannot work.
    """
    faults = []
    if zero_stage not in (0, 1, 2):
        faults.append(
            f"parallel.zero_stage={zero_stage} is not 0, 1 or 2; DeepSpeed's stage 3 "
            "refuses expert layers, use 2."
        )
    if precision not in ("fp32", "bf16"):
        faults.append(f"train.precision={precision!r} is not fp32 or bf16; choose one of them.")
    if micro_batches_per_step < 1:
        faults.append(f"train.accumulation={micro_batches_per_step} is not positive; use 1.")
    if faults:
        raise ConfigError(faults, source="engine")
    schedule = LearningRateSchedule(lr_schedule, num_steps, warmup_steps)
    grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    needs_deepspeed = grouped or zero_stage > 0 or ep_size > 1
    if needs_deepspeed:
        # Here and not above, so that one process trains without importing DeepSpeed.
        from moe_dist.distributed.deepspeed_runtime import start_deepspeed

        ensure_process_group()
        start_deepspeed()
        from moe_dist.distributed.expert_parallel import parallelize_experts

        parallelize_experts(model, ep_size, expert_orders)
    device = training_device() if device is None else device
    model.to(device)
    groups = parameter_groups(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        expert_learning_rate_scale=expert_learning_rate_scale,
    )
    optimizer = build_adamw(groups, betas=betas, eps=eps)
    if not needs_deepspeed:
        return LocalEngine(
            model,
            optimizer,
            schedule=schedule,
            precision=precision,
            max_grad_norm=max_grad_norm,
            device=device,
        )
    from moe_dist.distributed.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        optimizer,
        schedule=schedule,
        precision=precision,
        max_grad_norm=max_grad_norm,
        device=device,
        zero_stage=zero_stage,
        ep_size=ep_size,
    )
