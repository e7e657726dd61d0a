"""Which device and which precision a worker trains in."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from typing import Literal

import torch

from moe_dist.distributed.launch import training_device
from moe_dist.errors import ClusterError
from moe_dist.training.collectives import max_over_ranks

Precision = Literal["fp32", "bf16"]


def pick_device(use_gpu: bool | str = "auto") -> torch.device:
    """Choose this worker's device.

    Args:
        use_gpu: ``auto`` takes a GPU where one is visible.

    Returns:
        The worker's own GPU, or the CPU.

    Raises:
        ClusterError: if a GPU is asked for and none is visible.
    """
    if use_gpu is False or (use_gpu == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            "parallel.use_gpu is true, but this worker sees no GPU",
            remedy="set parallel.use_gpu=auto or false, or start Ray with --num-gpus",
        )
    return training_device()


def pick_precision(precision: str, device: torch.device) -> Precision:
    """Turn ``auto`` into what every worker is fast at; collective.

    Args:
        precision: ``auto``, ``fp32`` or ``bf16``.
        device: this worker's.

    Returns:
        The same on every rank.
    """
    if precision in ("fp32", "bf16"):
        return "bf16" if precision == "bf16" else "fp32"
    slow = max_over_ranks(0 if _is_fast_at_bf16(device) else 1, device)
    return "fp32" if slow else "bf16"


def peak_memory_gib() -> float:
    """Return the largest resident memory this process has had.

    Returns:
        GiB of main memory.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**3 if sys.platform == "darwin" else 1024**2)


def return_free_memory() -> None:
    """Hand the pages of what was freed back to the operating system, where the C library can.

    glibc keeps the activations of a training in its heap, in pieces that the next training, of
    other sizes, uses only in part: a process that trains one model after another grows and grows.
    """
    with suppress(OSError, AttributeError):  # No glibc.
        ctypes.CDLL(None).malloc_trim(0)


def _is_fast_at_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Without such instructions bf16 on a CPU is emulated, several times slower than fp32.
    capabilities = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in capabilities)
