"""AdamW's moments by parameter name, wherever the optimizer keeps them.

Plain torch and ZeRO 0 keep them by parameter. ZeRO 1 and 2 flatten each parameter group, cut it
over the group's data-parallel ranks, and keep one flat state for each cut; DeepSpeed's own
accessor does not cover expert parameters there, so the flat layout is read and written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.host_memory import join_parts

MOMENTS = ("exp_avg", "exp_avg_sq")


def read_plain_moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a torch optimizer's own tensors as `<moment>.<name>`; empty before a step."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            found.update({f"{moment}.{name}": state[moment] for moment in MOMENTS})
    return found


def write_plain_moments(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Tensor],
    steps: int,
) -> None:
    """Set moments, as `read_plain_moments` returns them, after `steps` done steps."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if id(parameter) in held and f"{MOMENTS[0]}.{name}" in moments:
            optimizer.state[parameter] = _state(
                parameter, [moments[f"{moment}.{name}"] for moment in MOMENTS], steps, optimizer
            )


def read_flat_moments(module: nn.Module, zero: Any) -> dict[str, Tensor]:
    """Return moments that ZeRO 1 or 2 keeps in flat partitions; all ranks call it together.

    Each group's partitions go to the first rank of the ranks that share it: those of parameters
    that all ranks have to rank 0, those of experts to their first owner.

    Args:
        module: the model, for the names.
        zero: DeepSpeed's ZeRO optimizer.

    Returns:
        `<moment>.<name>` to CPU tensors of those parameters for which this rank is the first, on
        the others nothing; empty before the first step.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, Tensor] = {}
    for index, partition in enumerate(zero.single_partition_of_fp32_groups):
        state = zero.optimizer.state.get(partition)
        if not state:
            continue
        group = zero.real_dp_process_group[index]
        is_first = dist.get_rank(group) == 0
        size = partition.numel() * dist.get_world_size(group)
        for moment in MOMENTS:
            flat = torch.empty(size, dtype=partition.dtype) if is_first else None
            join_parts(state[moment], group, flat)
            for parameter, view in [] if flat is None else flat_views(zero, index, flat):
                found[f"{moment}.{names[id(parameter)]}"] = view
    return found


def write_flat_moments(
    module: nn.Module, zero: Any, moments: Mapping[str, Tensor], steps: int
) -> None:
    """Set moments that ZeRO 1 or 2 keeps in flat partitions.

    Args:
        module: the model, for the names.
        zero: DeepSpeed's ZeRO optimizer.
        moments: as `read_flat_moments` returns them, for this rank's parameters.
        steps: optimizer steps that are done.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    for index, partition in enumerate(zero.single_partition_of_fp32_groups):
        cut: list[Tensor] = []
        for moment in MOMENTS:
            flat = torch.zeros(zero.bit16_groups_flat[index].numel(), dtype=partition.dtype)
            for parameter, view in flat_views(zero, index, flat):
                view.copy_(moments[f"{moment}.{names[id(parameter)]}"])
            rank = dist.get_rank(zero.real_dp_process_group[index])
            cut.append(flat[rank * partition.numel() : (rank + 1) * partition.numel()].clone())
        zero.optimizer.state[partition] = _state(partition, cut, steps, zero.optimizer)


def flat_views(zero: Any, index: int, flat: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each parameter's view of its group's flat tensor, laid out as its weights."""
    offsets = zero.round_robin_bit16_offsets[index]
    return [
        (parameter, flat.narrow(0, offset, parameter.numel()).view(parameter.shape))
        for parameter, offset in zip(zero.round_robin_bit16_groups[index], offsets, strict=True)
    ]


def _state(
    parameter: Tensor, values: list[Tensor], steps: int, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    fused = bool(optimizer.param_groups[0].get("fused"))
    step = torch.tensor(float(steps), dtype=torch.float32)
    state = {"step": step.to(parameter.device) if fused else step}
    for moment, value in zip(MOMENTS, values, strict=True):
        state[moment] = value.detach().to(parameter.device, torch.float32, copy=True)
    return state
