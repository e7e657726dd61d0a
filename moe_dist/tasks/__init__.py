"""Kinds of tasks, one file each: labels, tokens, losses, answers, metrics.

A new kind is a class that fulfils `TaskKind` and a row here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_dist.errors import ConversionError
from moe_dist.tasks.causal_lm import CausalLM
from moe_dist.tasks.classification import Classification
from moe_dist.tasks.embedding import Embedding
from moe_dist.tasks.kind import Answered, Figures, TaskKind, TokenRows
from moe_dist.tasks.question_answering import QuestionAnswering
from moe_dist.tasks.regression import Regression
from moe_dist.tasks.seq2seq import Seq2Seq

__all__ = [
    "Answered",
    "Figures",
    "TASK_KINDS",
    "TaskKind",
    "TokenRows",
    "head_kind",
    "model_kind",
]

TASK_KINDS: dict[str, TaskKind] = {
    kind.name: kind
    for kind in (
        Classification(),
        Regression(),
        Embedding(),
        CausalLM(),
        QuestionAnswering(),
        Seq2Seq(),
    )
}


def head_kind(label_names: Sequence[str] | None) -> TaskKind:
    """Tell what kind of task a head answers by the names of its classes; None without classes."""
    return next(
        kind
        for kind in TASK_KINDS.values()
        if kind.joins_tasks and kind.has_classes == (label_names is not None)
    )


def model_kind(model: Any) -> TaskKind:
    """Tell what kind of task a model of one task is for, by its class and configuration.

    A class that no kind knows is a ConversionError.
    """
    # Wrappers of engines keep the model's class out of sight; a configuration always names it.
    name = type(model).__name__.removeprefix("Moe")
    for kind in TASK_KINDS.values():
        if kind.owns(name, model.config):
            return kind
    raise ConversionError(
        f"{type(model).__name__} answers no kind of task that moe-dist knows",
        remedy="give a model whose class is one of "
        + ", ".join(dict.fromkeys(kind.auto_class for kind in TASK_KINDS.values())),
    )
