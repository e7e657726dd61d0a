"""Kinds of tasks, one file each: labels, head, losses, answers, metrics.

A new kind is a class that fulfils `TaskKind` and a row here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_dist.tasks.classification import Classification
from moe_dist.tasks.kind import TaskKind
from moe_dist.tasks.regression import Regression

__all__ = ["TASK_KINDS", "TaskKind", "head_kind", "model_kind"]

TASK_KINDS: dict[str, TaskKind] = {kind.name: kind for kind in (Classification(), Regression())}


def head_kind(label_names: Sequence[str] | None) -> TaskKind:
    """Tell what kind of task a head answers by the names of its classes; None without classes."""
    return next(
        kind for kind in TASK_KINDS.values() if kind.has_classes == (label_names is not None)
    )


def model_kind(config: Any) -> TaskKind:
    """Tell what kind of task a model of one task is for, by its transformers configuration."""
    return next(kind for kind in TASK_KINDS.values() if kind.owns(config))
