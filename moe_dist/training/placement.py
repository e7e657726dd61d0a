"""Where a job's workers go: the wish checked against what the Ray cluster has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_dist.errors import ClusterError

if TYPE_CHECKING:
    from ray.train import ScalingConfig


def plan_workers(num_workers: int, cpus_per_worker: int, use_gpu: bool | None) -> ScalingConfig:
    """Check the wish against the cluster, since Ray would wait for ever.

    Args:
        num_workers: processes, each in a place of its own.
        cpus_per_worker: CPUs that each of them reserves.
        use_gpu: one GPU for each worker; None takes them where Ray has enough of them.

    Returns:
        How Ray Train is to place the workers.

    Raises:
        ClusterError: if the cluster has fewer CPUs or GPUs than asked for.
    """
    import ray
    from ray.train import ScalingConfig

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    wanted_cpus = num_workers * cpus_per_worker
    if wanted_cpus > cpus:
        fitting = max(1, cpus // cpus_per_worker)
        raise ClusterError(
            f"parallel.num_workers={num_workers} x parallel.cpus_per_worker={cpus_per_worker} "
            f"= {wanted_cpus} CPUs, and the Ray cluster has {cpus}",
            remedy=f"Set parallel.num_workers to {fitting} or less, reserve fewer CPUs for each "
            "worker, or add nodes.",
        )
    if use_gpu is True and num_workers > gpus:
        raise ClusterError(
            f"parallel.num_workers={num_workers} on GPUs needs {num_workers} GPUs, and the Ray "
            f"cluster has {gpus}",
            remedy="Set parallel.use_gpu=false, lower parallel.num_workers, or add GPU nodes.",
        )
    on_gpu = gpus >= num_workers if use_gpu is None else use_gpu
    per_worker = {"CPU": float(cpus_per_worker)} | ({"GPU": 1.0} if on_gpu else {})
    return ScalingConfig(num_workers=num_workers, use_gpu=on_gpu, resources_per_worker=per_worker)
