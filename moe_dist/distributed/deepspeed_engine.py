"""The engine of many processes: DeepSpeed with exact expert gradients, norms and accumulation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.expert_parallel import (
    expert_data_group,
    expert_group,
    share_mailboxes,
)
from moe_dist.distributed.moments import (
    read_flat_moments,
    read_plain_moments,
    write_flat_moments,
    write_plain_moments,
)
from moe_dist.distributed.parameter_groups import is_expert_slice
from moe_dist.distributed.position import collective, mark_calls
from moe_dist.distributed.reduction import Reduction, average_gradients, reduction_over
from moe_dist.distributed.schedule import LearningRateSchedule
from moe_dist.distributed.scheduled_engine import ScheduledEngine
from moe_dist.distributed.update import (
    Precision,
    checked_norm,
    clipped,
    fill_missing_gradients,
    set_rates,
)

# Gradients are reduced in buckets of about this many elements (100 MB in fp32).
BUCKET_ELEMENTS = 25_000_000


class DeepSpeedEngine(ScheduledEngine):
    """DeepSpeed's engine under the `TrainEngine` contract.

    What DeepSpeed does otherwise and is set right here: it divides the loss by the number of
    micro-batches; it averages the gradient norms of different experts over ranks, where the norm
    of the whole model is needed for clipping; it turns autocast off in its own forward (the
    module is called directly); without ZeRO it sends whole embedding tables (see `reduction`).

    Args:
        model: on the device, its experts cut to this rank's slice.
        optimizer: over the model's parameters, groups with `base_lr`.
        schedule: learning rate over steps.
        precision: "bf16" keeps weights in fp32 and computes under autocast.
        max_grad_norm: global norm to clip to; 0 for none.
        device: where the model is.
        zero_stage: 0, 1 or 2.
        ep_size: ranks that share one set of experts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: LearningRateSchedule,
        precision: Precision,
        max_grad_norm: float,
        device: torch.device,
        zero_stage: int,
        ep_size: int,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            schedule=schedule,
            precision=precision,
            max_grad_norm=max_grad_norm,
            device=device,
        )
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.zero_stage = zero_stage
        self.ep_size = ep_size
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        config = _deepspeed_config(self._trained, self.world_size, zero_stage, max_grad_norm)
        # DeepSpeed prints beside its logger while it starts.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
        if ep_size > 1 and device.type == "cpu":
            with collective("shared memory for tokens"):
                share_mailboxes(model)
        self._everyone: Reduction | None = None
        self._same_experts: Reduction | None = None
        if zero_stage == 0:
            self._engine.enable_backward_allreduce = False
            self._connect_ranks()
        else:
            self._engine.optimizer.scaled_global_norm = self._partitioned_norm
            mark_calls(self._engine.optimizer, "reduce_ipg_grads", "reduction of gradients")

    def backward(self, loss: Tensor, *, is_last_micro_batch: bool) -> None:
        """Add a micro-batch's gradients, and reduce them over ranks after the last."""
        self._engine.set_gradient_accumulation_boundary(is_last_micro_batch)
        self._engine.backward(loss, scale_wrt_gas=False)
        if self.zero_stage == 0 and is_last_micro_batch:
            fill_missing_gradients(self._trained)
            with collective("reduction of gradients"):
                average_gradients(self._trained, self._everyone, self._same_experts)

    def _connect_ranks(self) -> None:
        """Find out how gradients are added up over ranks; collective."""
        with collective("shared memory for gradients"):
            world = dist.group.WORLD
            assert world is not None
            self._everyone = reduction_over(world, self.device)
            if self.ep_size > 1:
                expert_group(self.ep_size)
                group = expert_data_group(self.ep_size)
                self._same_experts = reduction_over(group, self.device)

    def step(self) -> float:
        """Clip, update and clear the gradients; give all ranks' norm before clipping."""
        set_rates(self.optimizer, self._schedule.factor(self.steps_done))
        if self.zero_stage == 0:
            norm = checked_norm(self._whole_norm(), self.steps_done)
            gradients = [p.grad for p in self._trained if p.grad is not None]
            with clipped(self.optimizer, gradients, norm, self._max_grad_norm):
                self._engine.step()
        else:
            # Stages 1 and 2 leave the weights alone where the norm is not finite.
            with collective("update of partitioned weights"):
                self._engine.step()
            norm = checked_norm(float(self._engine.get_global_grad_norm()), self.steps_done)
        self.steps_done += 1
        return norm

    def read_moments(self) -> dict[str, Tensor]:
        """Return this rank's optimizer moments, as `LocalEngine` does; collective.

        Under ZeRO 1 and 2 only the first of the ranks that hold a parameter has them.
        """
        if self.zero_stage == 0:
            return read_plain_moments(self.module, self.optimizer)
        return read_flat_moments(self.module, self._engine.optimizer)

    def write_moments(self, moments: Mapping[str, Tensor] | None, steps: int) -> None:
        """Set the moments (None: fresh) and adopt the module's present weights."""
        self.steps_done = steps
        if self.zero_stage > 0:
            # The optimizer updates its own copy of the weights.
            self._engine.optimizer.refresh_fp32_params()
        if moments is None:
            return
        if self.zero_stage == 0:
            write_plain_moments(self.module, self.optimizer, moments, steps)
        else:
            write_flat_moments(self.module, self._engine.optimizer, moments, steps)

    def _whole_norm(self) -> float:
        """Return the norm of reduced gradients that every rank holds whole (ZeRO 0)."""
        dense = [p.grad for p in self._trained if p.grad is not None and not is_expert_slice(p)]
        experts = [p.grad for p in self._trained if p.grad is not None and is_expert_slice(p)]
        squares = _sum_of_squares(experts, self.device)
        if self.ep_size > 1:
            with collective("gradient norm of experts"):
                dist.all_reduce(squares, group=expert_group(self.ep_size))
        return float((squares + _sum_of_squares(dense, self.device)).sqrt())

    def _partitioned_norm(self, norm_type: int = 2) -> Tensor:
        """Return the norm of reduced gradients of which each element is on one rank (ZeRO 1, 2)."""
        assert norm_type == 2
        zero = self._engine.optimizer
        mine = [
            g for index in range(len(zero.bit16_groups)) for g in zero.averaged_gradients[index]
        ]
        squares = _sum_of_squares(mine, self.device)
        with collective("gradient norm"):
            dist.all_reduce(squares)
        return squares.sqrt().float()


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(tensors)
    return torch.stack(norms).double().square().sum()


def _deepspeed_config(
    parameters: list[nn.Parameter], world_size: int, zero_stage: int, max_grad_norm: float
) -> dict[str, Any]:
    largest = max((p.numel() for p in parameters), default=1)
    bucket = max(largest, min(BUCKET_ELEMENTS, sum(p.numel() for p in parameters)))
    return {
        # Only their product is checked; the loop cuts its own batches.
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
        },
        # Stage 0 is clipped by this engine; unset, DeepSpeed would clip at 1.0.
        "gradient_clipping": max_grad_norm if zero_stage > 0 else 0.0,
        "steps_per_print": None,
    }
