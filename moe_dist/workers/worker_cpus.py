"""How many CPUs each worker has, where a recipe leaves it to `auto`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from moe_dist.workers.driver import runs_here
from moe_dist.workers.ray_session import available_cpus

if TYPE_CHECKING:
    from moe_dist.config.sections import ParallelConfig


def worker_cpus(parallel: ParallelConfig) -> int:
    """Count the CPUs that each worker of a training reserves; it has as many threads.

    That is `parallel.cpus_per_worker` where it is a number. `auto` is, at the first of these that
    holds:

    - 1 on a GPU, and on a cluster (`RAY_ADDRESS`): what is not ours is not reserved unasked;
    - in this process `OMP_NUM_THREADS` if it is set, else every CPU that the process may use;
    - on a Ray that is started here an equal share of these for each of the most workers, or
      `OMP_NUM_THREADS` if it is less: more threads than CPUs would only wait for each other.
    """
    wished = parallel.cpus_per_worker
    if wished != "auto":
        return wished
    is_here = runs_here(parallel.launcher, parallel.num_workers)
    if _takes_gpus(parallel) or (os.environ.get("RAY_ADDRESS") and not is_here):
        return 1
    from moe_dist.distributed.launch import threads_of_environment

    asked = threads_of_environment()
    if is_here:
        return asked or available_cpus()
    share = max(1, available_cpus() // parallel.max_workers)
    return min(asked or share, share)


def trial_cpus(cpus_per_worker: int | Literal["auto"]) -> int:
    """Count the CPUs of a worker of a search's trial; `auto` is 1, so that many run at once."""
    return 1 if cpus_per_worker == "auto" else cpus_per_worker


def _takes_gpus(parallel: ParallelConfig) -> bool:
    """Tell what `choose_placement` will of this machine: whether each worker gets a GPU."""
    if parallel.use_gpu != "auto":
        return parallel.use_gpu
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() >= parallel.min_workers
