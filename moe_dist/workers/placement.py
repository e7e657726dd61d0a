"""Where a job's workers go: the wish checked against what the cluster has and may get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_dist.errors import ClusterError
from moe_dist.workers.cluster_capacity import Capacity, WorkerNeed, describe_nodes, read_capacity

if TYPE_CHECKING:
    from ray.train import ScalingConfig

NumWorkers = int | tuple[int, int]
"""A number of workers, or the least and the most of them."""

RESIZE_INTERVAL_S = 60.0
"""How often Ray Train looks whether an elastic job can have more workers."""


@dataclass(frozen=True)
class Placement:
    """How many workers are wanted, and what each of them reserves.

    Args:
        least: with fewer workers the job does not run.
        most: more of them are not started.
        need: of one worker.
    """

    least: int
    most: int
    need: WorkerNeed

    @property
    def wish(self) -> str:
        """Name the wish by its keys."""
        if self.least == self.most:
            return f"parallel.num_workers={self.least}"
        return f"parallel.num_workers=[{self.least}, {self.most}] asks for at least {self.least}"

    @property
    def resources(self) -> dict[str, float]:
        """What one worker reserves, as Ray names it."""
        gpus = {"GPU": float(self.need.gpus)} if self.need.gpus else {}
        return {"CPU": float(self.need.cpus)} | gpus

    def scaling(self) -> ScalingConfig:
        """Say it to Ray Train.

        Workers are packed on as few nodes as hold them, and Ray Train numbers the ranks node by
        node, so that consecutive ranks, which share a set of experts, share a node.
        """
        from ray.train import ScalingConfig

        return ScalingConfig(
            num_workers=self.least if self.least == self.most else (self.least, self.most),
            use_gpu=self.need.gpus > 0,
            resources_per_worker=self.resources,
            placement_strategy="PACK",
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        )


def plan_placement(
    num_workers: NumWorkers, cpus_per_worker: int, use_gpu: bool | None
) -> Placement:
    """Check a wish, as `choose_placement`, against the cluster of this process."""
    return choose_placement(read_capacity(), num_workers, cpus_per_worker, use_gpu)


def choose_placement(
    capacity: Capacity, num_workers: NumWorkers, cpus_per_worker: int, use_gpu: bool | None
) -> Placement:
    """Check a wish against what a cluster has and may get; it can be met now or later.

    A pair for `num_workers` is the least and the most; a `use_gpu` of None takes a GPU for each
    worker where there can be enough. ClusterError, with the arithmetic, if it can never be met.
    """
    least, most = num_workers if isinstance(num_workers, tuple) else (num_workers, num_workers)
    on_gpu = Placement(least, most, WorkerNeed(cpus_per_worker, gpus=1))
    on_cpu = Placement(least, most, WorkerNeed(cpus_per_worker))
    if use_gpu is None:
        # An autoscaler that does not tell its bounds is not waited for on a mere chance.
        known = capacity if capacity.kinds is not None else Capacity(capacity.nodes)
        use_gpu = known.most_slots(on_gpu.need) >= least
    chosen = on_gpu if use_gpu else on_cpu
    if capacity.most_slots(chosen.need) < least:
        raise _impossible(capacity, chosen)
    return chosen


def _impossible(capacity: Capacity, placement: Placement) -> ClusterError:
    need, least = placement.need, placement.least
    cpus, gpus = _most(capacity)
    has = f"the Ray cluster has {cpus:g} ({describe_nodes(capacity)})"
    if capacity.max_added:
        has = (
            f"the Ray cluster can grow to {cpus:g} at most ({describe_nodes(capacity)}; the "
            f"autoscaler may add {capacity.max_added} nodes)"
        )
    num_slots = int(capacity.most_slots(need))
    ways = [f"set parallel.num_workers to {num_slots} or less"] if num_slots else []
    if need.cpus > 1:
        ways.append("reserve fewer CPUs for each worker (parallel.cpus_per_worker)")
    ways.append("add nodes" if num_slots else "add larger nodes")
    text = ", or ".join([", ".join(ways[:-1]), ways[-1]] if ways[1:] else ways)
    fewer = f"{text[:1].upper()}{text[1:]}."
    if need.gpus and least > gpus:
        return ClusterError(
            f"{placement.wish} on GPUs needs {least} GPUs, and the Ray cluster has "
            f"{gpus:g} ({describe_nodes(capacity)})",
            remedy="Set parallel.use_gpu=false, lower parallel.num_workers, or add GPU nodes.",
        )
    if least * need.cpus > cpus:
        return ClusterError(
            f"{placement.wish} x parallel.cpus_per_worker={need.cpus} = {least * need.cpus} CPUs, "
            f"and {has}",
            remedy=fewer,
        )
    return ClusterError(
        f"{placement.wish} needs {least} slots of {need}, each on one node, and "
        f"{num_slots} fit on the nodes: {has}",
        remedy=fewer,
    )


def _most(capacity: Capacity) -> tuple[float, float]:
    """Count the CPUs and GPUs that there can ever be."""
    cpus = sum(node.cpus for node in capacity.nodes)
    gpus = sum(node.gpus for node in capacity.nodes)
    for name in ("cpus", "gpus"):
        left, added = capacity.max_added, 0.0
        for kind in sorted(capacity.kinds or (), key=lambda kind: -getattr(kind, name)):
            count = min(left, kind.max_nodes)
            added += count * getattr(kind, name)
            left -= count
        cpus, gpus = (cpus + added, gpus) if name == "cpus" else (cpus, gpus + added)
    return cpus, gpus
