"""Several tasks in one model: one encoder, and one head for each task.

The heads are blocks of rows of the one linear layer that gives the logits, so a model of several
tasks is a plain sequence classifier of its architecture: scored, split, cut and saved like any
other. Its configuration's `task_heads` says which rows are whose, and hooks leave only those of
the task that is asked for: the one that `use_task` names, else the one that `choose_task` chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.families import FAMILIES, FamilySpec, find_stacks, known_family
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.routing import CHOSEN_TASK, current_context
from moe_dist.tasks import TaskKind, head_kind, model_kind

KEY = "task_heads"
"""Entry of a configuration: a list of mappings with `name` and `label_names`."""


@dataclass(frozen=True)
class TaskHead:
    """One task's part of the logits.

    Args:
        name: the task's.
        label_names: its classes in the order of their ids; None for regression.
    """

    name: str
    label_names: tuple[str, ...] | None

    @property
    def kind(self) -> TaskKind:
        """What kind of task it answers."""
        return head_kind(self.label_names)

    @property
    def num_labels(self) -> int:
        """Outputs: classes, or 1 for regression."""
        return self.kind.num_outputs(self.label_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """A name for each output, different from those of other tasks."""
        return tuple(f"{self.name}/{label}" for label in self.label_names or ("value",))


def read_heads(model: nn.Module) -> tuple[TaskHead, ...]:
    """Give a model's heads in the order of the tasks' numbers; none for a model of one task."""
    entries = getattr(getattr(model, "config", None), KEY, None) or ()
    return tuple(
        TaskHead(entry["name"], tuple(entry["label_names"]) if entry["label_names"] else None)
        for entry in entries
    )


def set_heads(model: Any, heads: Sequence[TaskHead]) -> None:
    """Hand the outputs of a classifier out to several tasks.

    Args:
        model: a sequence classifier with as many outputs as the heads have in sum; changed in
            place.
        heads: at least two, in the order of the tasks' numbers.

    Raises:
        ConversionError: if names repeat, the outputs do not add up, or the architecture's head is
            not known.
    """
    names = [head.name for head in heads]
    if len(set(names)) < max(2, len(names)):
        raise ConversionError(
            f"tasks {names} are not two or more different ones", remedy="name each task once"
        )
    num_outputs = sum(head.num_labels for head in heads)
    if task_head(model).weight.shape[0] != num_outputs:
        raise ConversionError(
            f"{type(model).__name__} has {task_head(model).weight.shape[0]} outputs, and its tasks "
            f"have {num_outputs}",
            remedy="build the model with as many labels as all tasks have together",
        )
    labels = [name for head in heads for name in head.output_names]
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: index for index, name in enumerate(labels)}
    entries = [
        {"name": head.name, "label_names": list(head.label_names) if head.label_names else None}
        for head in heads
    ]
    setattr(model.config, KEY, entries)
    install_heads(model)


def install_heads(model: nn.Module) -> None:
    """Let a model of several tasks answer for one at a time; others are left as they are."""
    if not read_heads(model) or _keep_own_logits in model._forward_hooks.values():
        return
    model.register_forward_pre_hook(_check_call, with_kwargs=True)
    model.register_forward_hook(_keep_own_logits)


def uninstall_heads(model: nn.Module) -> None:
    """Undo `install_heads`: a forward call then gives the logits of all tasks, side by side."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_check_call, _keep_own_logits)]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def choose_task(model: nn.Module, name: str) -> None:
    """Use a model for one of its tasks from now on, where no `use_task` says otherwise."""
    index = task_index(model, name)
    stacks = [stack for stack, _ in find_stacks(model, family_spec(model))]
    for module in (model, *stacks):
        setattr(module, CHOSEN_TASK, index)


def chosen_head(model: nn.Module) -> TaskHead | None:
    """Say what `choose_task` chose; None before that, and for a model of one task."""
    index = getattr(model, CHOSEN_TASK, None)
    return None if index is None else read_heads(model)[index]


def answered_kind(model: nn.Module) -> TaskKind:
    """Say what kind of task a forward call now answers."""
    heads = read_heads(model)
    return heads[_asked_task(model)].kind if heads else model_kind(model)


def task_index(model: nn.Module, name: str) -> int:
    """Give a task's place among the model's heads; one it lacks is a MissingInputError."""
    names = [head.name for head in read_heads(model)]
    if name not in names:
        raise MissingInputError(
            f"the model has no task {name!r}",
            remedy=f"choose from {', '.join(names)}" if names else "leave the task out: it has one",
        )
    return names.index(name)


def head_rows(heads: Sequence[TaskHead], index: int) -> slice:
    """Say which rows of the last layer, so which columns of the logits, are a task's."""
    ends = list(accumulate(head.num_labels for head in heads))
    return slice(ends[index] - heads[index].num_labels, ends[index])


def task_head(model: nn.Module) -> Any:
    """Find a classifier's last layer: `weight` (outputs, width) and perhaps `bias`.

    What is no sequence classifier of a known family is a ConversionError.
    """
    try:
        return model.get_submodule(family_spec(model).task_head)
    except AttributeError:
        raise ConversionError(
            f"{type(model).__name__} has no head that several tasks could share",
            remedy="use a sequence classifier",
        ) from None


def family_spec(model: nn.Module) -> FamilySpec:
    """Find a model's family, converted or not; one not known is a ConversionError."""
    spec = known_family(model)
    if spec is None:
        raise ConversionError(
            f"{type(model).__name__} is of no family that moe-dist knows",
            remedy=f"use a model of one of these: {', '.join(sorted(FAMILIES))}",
        )
    return spec


def _check_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _asked_task(model)
    if kwargs.get("labels") is not None:
        raise MissingInputError(
            "a model of several tasks computes no loss of its own",
            remedy="leave labels out, and compute the loss from the logits",
        )


def asked_rows(model: nn.Module) -> slice:
    """Say which columns of the logits are those of the task that a forward call now answers."""
    return head_rows(read_heads(model), _asked_task(model))


def _keep_own_logits(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    rows = asked_rows(model)
    if isinstance(output, tuple):
        return (output[0][..., rows], *output[1:])
    output.logits = output.logits[..., rows]
    return output


def _asked_task(model: nn.Module) -> int:
    context = current_context()
    task_ids = None if context is None else context.task_ids
    chosen = getattr(model, CHOSEN_TASK, None)
    heads = read_heads(model)
    names = ", ".join(head.name for head in heads)
    if task_ids is None and chosen is None:
        raise MissingInputError(
            f"the model answers {len(heads)} tasks ({names}), and this call names none",
            remedy="load it with load_model(directory, task=NAME), or call it inside "
            "use_task(NUMBER)",
        )
    index = int(chosen if task_ids is None else _same_task(task_ids))  # type: ignore[arg-type]
    if not 0 <= index < len(heads):
        raise MissingInputError(
            f"there is no task {index} among the model's {len(heads)} ({names})",
            remedy=f"number the tasks from 0 to {len(heads) - 1}",
        )
    return index


def _same_task(task_ids: Tensor) -> Tensor:
    if not bool(torch.all(task_ids == task_ids.reshape(-1)[0])):
        raise MissingInputError(
            f"one call asks for the tasks {sorted(set(task_ids.tolist()))}",
            remedy="make a batch of one task, since heads differ in size",
        )
    return task_ids.reshape(-1)[0]
