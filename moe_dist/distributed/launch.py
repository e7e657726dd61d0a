"""Where a process runs: its device, back end, threads and process group."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Saving a checkpoint or evaluating on one rank may keep the others waiting this long.
GROUP_TIMEOUT = timedelta(minutes=30)


def set_thread_count(num_threads: int | None = None) -> int:
    """Set how many CPU threads torch uses in this process, and return it.

    None takes `OMP_NUM_THREADS`, which Ray and torchrun set from a worker's CPUs, or else leaves
    torch's own choice. A count that is not positive is a ValueError.
    """
    if num_threads is None:
        num_threads = threads_of_environment()
    if num_threads is not None:
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads} is not positive")
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def threads_of_environment() -> int | None:
    """Read `OMP_NUM_THREADS`; None where it is not set to a number above 0."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else None


def training_device() -> torch.device:
    """Return this process's GPU where its process group (if any) can use it, else the CPU."""
    if dist.is_available() and dist.is_initialized():
        use_gpu = "nccl" in dist.get_backend() and torch.cuda.is_available()
    else:
        use_gpu = torch.cuda.is_available()
    if not use_gpu:
        return torch.device("cpu")
    return torch.device("cuda", _own_gpu())


def _own_gpu() -> int:
    """Number this process's GPU among those it sees, which may be its own alone."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return local_rank if local_rank < torch.cuda.device_count() else 0


def ensure_process_group() -> None:
    """Make sure that a process group stands.

    Ray's and torchrun's processes already have one or the variables for one; a process on its own
    becomes a group of one.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(_own_gpu())
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=GROUP_TIMEOUT)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def spawn_gloo(fn: Callable[..., Any], world_size: int, *args: Any) -> None:
    """Run `fn(rank, world_size, *args)` in several CPU processes of a gloo group.

    `fn` and `args` must be picklable. The processes meet through a file, so that parallel runs
    cannot race for a port. They are forked from a process that has imported what
    `multiprocessing.set_forkserver_preload` named, and nothing else of this one's state.
    """
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as directory:
        store_path = str(Path(directory) / "store")
        own = (fn, world_size, store_path, dict(os.environ), args)
        mp.start_processes(_run_in_group, args=own, nprocs=world_size, start_method="forkserver")


def _run_in_group(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    store_path: str,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    # The process that this one was forked from has that of the moment when it was started.
    os.environ.clear()
    os.environ.update(environment)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    set_thread_count()
    store = dist.FileStore(store_path, world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=5)
    )
    try:
        fn(rank, world_size, *args)
    finally:
        dist.destroy_process_group()
    # The work is done. While the interpreter takes itself apart, a thread of the group's that is
    # still joinable now and then aborts the process (torch 2.13): so it ends here.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
