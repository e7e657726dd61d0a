"""Bring DeepSpeed up once in a process that has a process group."""

from __future__ import annotations

import logging
import os

import torch.distributed as dist

from moe_dist.distributed.launch import training_device


def start_deepspeed() -> None:
    """Import DeepSpeed and let it use the process group that stands; safe to call again.

    DeepSpeed would otherwise compile a shared-memory reduction for CPUs, which needs a C++
    compiler and tens of seconds and which only its inference uses.
    """
    assert dist.is_initialized(), "ensure_process_group() comes first"
    device = training_device()
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

    import moe_dist.distributed.deepspeed_import  # noqa: F401, I001  # before all of DeepSpeed
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        # Reading this name probes every compiled operator; setting it first prevents that.
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
