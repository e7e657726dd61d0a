"""What the processes of `spawn_gloo` need, imported once: they are forked from one that has it."""

from __future__ import annotations

import os

# A process that is forked cannot use CUDA where its parent has looked for it through CUDA itself.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import datasets  # noqa: F401
import deepspeed.comm  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import moe_dist.jobs.distill
import moe_dist.jobs.importance
import moe_dist.jobs.predict  # noqa: F401
