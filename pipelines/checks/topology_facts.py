"""How the workers of a recipe share batches, experts and the optimizer, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_dist.distributed.topology import Topology, fitting_ep_size, list_groups
from moe_dist.workers.worker_cpus import worker_cpus

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

MAX_SHOWN_SIZES = 4


def topology_facts(config: RunConfig) -> list[tuple[str, str]]:
    """Say how the workers share batches and experts.

    One line for each number of workers that there may be, and one for ZeRO; of many numbers
    only the least and the most.
    """
    parallel, num_experts = config.parallel, config.moe.num_experts
    facts = []
    sizes = range(parallel.max_workers, parallel.min_workers - 1, -1)
    for world_size in sizes if len(sizes) <= MAX_SHOWN_SIZES else (sizes[0], sizes[-1]):
        ep_size = fitting_ep_size(world_size, num_experts, parallel.ep_size)
        topology = Topology((None,) * world_size, ep_size)
        text = f"data parallel {world_size}, expert parallel {ep_size}"
        if ep_size > 1:
            text += f" (ranks {list_groups(topology.expert_groups)} share the experts)"
        text += f", expert data parallel {topology.expert_data_parallel_size}"
        if 1 < topology.expert_data_parallel_size < world_size:
            text += f" (ranks {list_groups(topology.expert_data_parallel_groups)} hold the same)"
        facts.append((f"{world_size} worker{'s' if world_size > 1 else ''}", text))
    return [*facts, ("ZeRO", zero_fact(config))]


def cpus_fact(config: RunConfig) -> str:
    """Say how many CPUs each worker has when the recipe runs as this process would run it now."""
    parallel = config.parallel
    count = worker_cpus(parallel)
    return f"{count} (auto)" if parallel.cpus_per_worker == "auto" else str(count)


def zero_fact(config: RunConfig) -> str:
    """Say what ZeRO spreads, and over how many ranks, in one line without the word ZeRO."""
    parallel = config.parallel
    stage, num_workers = parallel.zero_stage, parallel.max_workers
    if stage == 0:
        return "stage 0, every rank keeps all gradients and optimizer states of its parameters"
    spread = "optimizer states" if stage == 1 else "gradients and optimizer states"
    if num_workers == 1:
        return f"stage {stage}, of no use with one worker: there is nobody to spread {spread} over"
    ep_size = fitting_ep_size(num_workers, config.moe.num_experts, parallel.ep_size)
    return (
        f"stage {stage}, {spread} spread over {num_workers} ranks, those of the experts over "
        f"{num_workers // ep_size}"
    )
