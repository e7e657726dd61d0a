"""A small all-to-all on the workers of a job: does it work, how fast, and who is where."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

SMALL_BYTES = 1024
NUM_SMALL = 20
NUM_LARGE = 5


@dataclass(frozen=True)
class Exchange:
    """What the workers measured.

    Attributes:
        nodes: for each rank the id of its node.
        backend: `gloo` or `nccl`.
        latency_ms: of an exchange of 1 KiB between each two ranks; the median, slowest rank.
        gb_per_s: bytes that leave a rank in a second, both ways at once; the median, slowest rank.
        is_correct: whether every rank received what the others sent.
        device_gib: memory of the smallest GPU; 0 on CPUs.
    """

    nodes: tuple[str, ...]
    backend: str
    latency_ms: float
    gb_per_s: float
    is_correct: bool
    device_gib: float


def exchange_job(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Exchange rows between all ranks, small and large, into fields of `Exchange`; collective.

    `payload` has ``num_bytes``, what each rank sends in a large exchange.
    """
    import ray
    import torch
    import torch.distributed as dist

    world_size, backend = dist.get_world_size(), dist.get_backend()
    on_gpu = "nccl" in backend
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def exchange(num_bytes: int) -> tuple[float, bool]:
        num_values = max(1, num_bytes // 4 // world_size) * world_size
        sent = torch.full((num_values,), float(dist.get_rank()), device=device)
        received = torch.empty_like(sent)
        dist.barrier()
        started = time.perf_counter()
        dist.all_to_all_single(received, sent)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        ranks = torch.arange(world_size, dtype=torch.float32, device=device)
        return seconds, bool((received.view(world_size, -1) == ranks[:, None]).all())

    small_s, small_correct = _slowest_median(exchange, SMALL_BYTES * world_size, NUM_SMALL)
    large_s, large_correct = _slowest_median(exchange, int(payload["num_bytes"]), NUM_LARGE)
    leaving = int(payload["num_bytes"]) * (world_size - 1) / world_size
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    mine = (ray.get_runtime_context().get_node_id(), memory, small_correct and large_correct)
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    return asdict(
        Exchange(
            nodes=tuple(node for node, _, _ in everyone),
            backend=backend,
            latency_ms=1e3 * small_s,
            gb_per_s=leaving / large_s / 1e9,
            is_correct=all(correct for _, _, correct in everyone),
            device_gib=min(memory for _, memory, _ in everyone) / (1 << 30),
        )
    )


def _slowest_median(
    exchange: Callable[[int], tuple[float, bool]], num_bytes: int, repeats: int
) -> tuple[float, bool]:
    """Time an exchange; the median over repeats of the slowest rank, the first one left out."""
    import torch
    import torch.distributed as dist

    times, correct = [], True
    for _ in range(repeats + 1):
        seconds, is_right = exchange(num_bytes)
        device = "cuda" if "nccl" in dist.get_backend() else "cpu"
        slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times.append(float(slowest))
        correct = correct and is_right
    return sorted(times[1:])[repeats // 2], correct
