"""Training over several processes: engines, expert parallelism and canonical checkpoints.

DeepSpeed is imported only when an engine needs it: one process trains without it.
"""

from __future__ import annotations

from moe_dist.distributed.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from moe_dist.distributed.checkpoint_files import list_checkpoints
from moe_dist.distributed.checkpoint_writer import CheckpointWriter
from moe_dist.distributed.engine import LocalEngine, TrainEngine, build_engine
from moe_dist.distributed.gathering import gather_state_dict
from moe_dist.distributed.launch import (
    ensure_process_group,
    set_thread_count,
    spawn_gloo,
    training_device,
)

__all__ = [
    "CheckpointWriter",
    "LocalEngine",
    "TrainEngine",
    "build_engine",
    "ensure_process_group",
    "gather_state_dict",
    "list_checkpoints",
    "load_checkpoint",
    "save_checkpoint",
    "set_thread_count",
    "spawn_gloo",
    "training_device",
    "verify_checkpoint",
]
