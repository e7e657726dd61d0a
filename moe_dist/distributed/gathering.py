"""A model's whole state from ranks that each hold some of the experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.expert_placement import Order, order_of, places
from moe_dist.distributed.host_memory import HostBuffers, join_parts
from moe_dist.distributed.parameter_groups import is_expert_slice
from moe_dist.distributed.position import collective


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers; a tied tensor once, under its first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def gather_state_dict(engine: TrainEngine) -> dict[str, Tensor]:
    """Return the whole model on the CPU of every rank, experts in global order; collective."""
    return {
        name: gather_experts(
            engine, tensor, is_expert=is_expert_slice(tensor), order=order_of(tensor)
        )
        for name, tensor in named_state(engine.module)
    }


def gather_model(engine: TrainEngine, buffers: HostBuffers | None = None) -> dict[str, Tensor]:
    """Return the whole model on the CPU of rank 0, nothing elsewhere; collective.

    It is laid down in `buffers`, or in new memory.
    """
    buffers = HostBuffers() if buffers is None else buffers
    gathered = {}
    for name, tensor in named_state(engine.module):
        is_expert, order = is_expert_slice(tensor), order_of(tensor)
        whole = _on_rank_zero(engine, name, tensor, buffers, is_expert=is_expert, order=order)
        if whole is not None:
            gathered[name] = whole
    return gathered


def gather_moments(engine: TrainEngine, buffers: HostBuffers | None = None) -> dict[str, Tensor]:
    """Return `<moment>.<name>` on the CPU of rank 0, nothing elsewhere; collective."""
    buffers = HostBuffers() if buffers is None else buffers
    experts = {n: order_of(p) for n, p in engine.module.named_parameters() if is_expert_slice(p)}
    gathered = {}
    for key, moment in sorted(engine.read_moments().items()):
        name = key.partition(".")[2]
        is_expert, order = name in experts, experts.get(name)
        whole = _on_rank_zero(engine, key, moment, buffers, is_expert=is_expert, order=order)
        if whole is not None:
            gathered[key] = whole
    return gathered


def gather_rng(engine: TrainEngine) -> dict[str, Tensor]:
    """Return every rank's `rank.<r>.cpu` and, on GPUs, `rank.<r>.cuda`; collective."""
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    gathered = {}
    for kind, mine in states.items():
        parts = [mine]
        if engine.world_size > 1:
            # NCCL carries tensors of the device only.
            local = mine.to(engine.device)
            parts = [torch.empty_like(local) for _ in range(engine.world_size)]
            with collective("gathering of random states"):
                dist.all_gather(parts, local)
        gathered.update({f"rank.{rank}.{kind}": part.cpu() for rank, part in enumerate(parts)})
    return gathered


def gather_experts(
    engine: TrainEngine, tensor: Tensor, *, is_expert: bool, order: Order | None = None
) -> Tensor:
    """Return a tensor with all experts, on the CPU.

    Args:
        engine: whose ranks share the experts.
        tensor: (E / ep_size, ...) if it holds experts.
        is_expert: whether it does; any other tensor is copied as it is.
        order: of the experts over the ranks; that of their numbers if None.

    Returns:
        (E, ...) in the order of their numbers, or the copy.
    """
    tensor = tensor.detach()
    if not is_expert or engine.ep_size == 1:
        return tensor.to("cpu", copy=True).contiguous()
    # Here, since it brings DeepSpeed in, which an engine with ep_size > 1 has done before.
    from moe_dist.distributed.expert_parallel import expert_group

    parts = [torch.empty_like(tensor) for _ in range(engine.ep_size)]
    with collective("gathering of experts"):
        dist.all_gather(parts, tensor.contiguous(), group=expert_group(engine.ep_size))
    whole = torch.cat(parts).cpu()
    return whole if order is None else whole[places(order)]


def _on_rank_zero(
    engine: TrainEngine,
    name: str,
    tensor: Tensor,
    buffers: HostBuffers,
    *,
    is_expert: bool,
    order: Order | None,
) -> Tensor | None:
    """Lay a tensor with all experts down on rank 0; the first expert group calls it together."""
    tensor = tensor.detach()
    if not is_expert or engine.ep_size == 1:
        if engine.rank > 0:
            return None
        return buffers.get(name, tensor.shape, tensor.dtype).copy_(tensor)
    if engine.rank >= engine.ep_size:
        return None
    from moe_dist.distributed.expert_parallel import expert_group

    whole = None
    if engine.rank == 0:
        shape = (engine.ep_size * tensor.shape[0], *tensor.shape[1:])
        whole = buffers.get(name, shape, tensor.dtype)
    join_parts(tensor.to(engine.device), expert_group(engine.ep_size), whole)
    if whole is not None and order is not None:
        whole.copy_(whole[places(order)])
    return whole


def own_experts(engine: TrainEngine, tensor: Tensor) -> list[int]:
    """Number the experts that a slice of this rank's holds."""
    start = (engine.rank % engine.ep_size) * len(tensor)
    numbers = range(start, start + len(tensor))
    order = order_of(tensor)
    return list(numbers) if order is None else [order[number] for number in numbers]
