"""Which device and which precision a worker trains in."""

from __future__ import annotations

import ctypes
import logging
import resource
import sys
from contextlib import AbstractContextManager, suppress

import torch

from moe_dist.distributed.launch import training_device
from moe_dist.distributed.update import Precision, precision_context
from moe_dist.errors import ClusterError, TrainingError
from moe_dist.training.collectives import max_over_ranks, own_rank

logger = logging.getLogger(__name__)


def pick_device(use_gpu: bool | str = "auto") -> torch.device:
    """Choose this worker's device; ``auto`` takes its GPU where one is visible.

    A GPU that is asked for and not visible is a ClusterError.
    """
    if use_gpu is False or (use_gpu == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            "parallel.use_gpu is true, but this worker sees no GPU",
            remedy="set parallel.use_gpu=auto or false, or start Ray with --num-gpus",
        )
    return training_device()


def pick_precision(precision: str, device: torch.device, fault: str = "") -> Precision:
    """Turn ``auto`` into what every worker is fast at; collective.

    `fault` says why the model cannot compute in bf16 (`half_fault`): then that is a TrainingError,
    and ``auto`` is fp32.
    """
    if precision == "bf16" and fault:
        raise TrainingError(
            f"train.precision=bf16, and {fault}", remedy="set train.precision=fp32 or auto"
        )
    if precision in ("fp32", "bf16"):
        return "bf16" if precision == "bf16" else "fp32"
    slow = max_over_ranks(0 if _is_fast_at_bf16(device) else 1, device)
    if fault and not slow and own_rank() == 0:
        logger.warning("train.precision=auto computes in fp32: %s", fault)
    return "fp32" if slow or fault else "bf16"


def pick_own_precision(precision: str, device: torch.device, fault: str = "") -> Precision:
    """Choose for what this process computes alone, such as the start of a student; not collective.

    Bf16 that is meant for GPUs is not emulated on a CPU. `fault` is that of `pick_precision`.
    """
    is_half = precision != "fp32" and not fault and _is_fast_at_bf16(device)
    return "bf16" if is_half else "fp32"


def answering(device: torch.device, fault: str = "") -> AbstractContextManager[object]:
    """Compute as answers are given: in bf16 on a GPU that is fast at it, on a CPU in fp32.

    `fault` is that of `pick_precision`.
    """
    is_half = device.type != "cpu" and _is_fast_at_bf16(device) and not fault
    return precision_context("bf16" if is_half else "fp32", device)


def begin_peak_device_memory(device: torch.device) -> None:
    """Count from now on what `peak_device_memory_gib` tells: a process may train many times."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_memory_gib(device: torch.device) -> float | None:
    """Return the most that tensors have taken on the fullest rank's GPU, in GiB; collective.

    Since `begin_peak_device_memory`; None on a CPU.
    """
    if device.type != "cuda":
        return None
    return max_over_ranks(torch.cuda.max_memory_allocated(device), device) / 1024**3


def peak_memory_gib() -> float:
    """Return the largest resident main memory this process has had, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**3 if sys.platform == "darwin" else 1024**2)


def return_free_memory() -> None:
    """Hand freed pages back to the system: glibc keeps them, and with many trainings they grow."""
    with suppress(OSError, AttributeError):  # No glibc.
        ctypes.CDLL(None).malloc_trim(0)


def keep_free_memory() -> None:
    """Let glibc keep, up to 2 GiB, what a step's tensors give back, for those of the next step.

    The system would take it and give it again page by page, each of them cleared: a twentieth of a
    step of many weights. `return_free_memory` hands it back.
    """
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h names them
    with suppress(OSError, AttributeError):  # No glibc.
        mallopt = ctypes.CDLL(None).mallopt
        # The most that glibc takes: larger tensors are the system's all the same.
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)


def _is_fast_at_bf16(device: torch.device) -> bool:
    if device.type != "cpu":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Without such instructions bf16 on a CPU is emulated, several times slower than fp32.
    capabilities = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in capabilities)
