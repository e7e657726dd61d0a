"""Recipes: YAML and dotted overrides become one frozen, checked RunConfig."""

from __future__ import annotations

from moe_dist.config.data_section import DataConfig, TaskDataConfig
from moe_dist.config.evaluate_section import EvaluateConfig
from moe_dist.config.loading import build_config, load_config, read_settings
from moe_dist.config.moe_section import MoeConfig
from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.config.run_config import RunConfig, dense_overrides
from moe_dist.config.search_section import SearchConfig
from moe_dist.config.sections import (
    DistillConfig,
    FinetuneConfig,
    ModelConfig,
    ParallelConfig,
    TrackingConfig,
    TrainConfig,
)
from moe_dist.config.student import StudentConfig

__all__ = [
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "ModelConfig",
    "MoeConfig",
    "ObjectivesConfig",
    "ParallelConfig",
    "RunConfig",
    "SearchConfig",
    "StudentConfig",
    "TaskDataConfig",
    "TrackingConfig",
    "TrainConfig",
    "build_config",
    "dense_overrides",
    "load_config",
    "read_settings",
]
