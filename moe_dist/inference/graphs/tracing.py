"""A model as one graph whose batch and length are free, and whose routing follows the data.

torch.export traces it once, with each MoE layer as plain operations; ONNX is made of the same.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from moe_dist.conversion.heads import uninstall_heads
from moe_dist.errors import ConversionError
from moe_dist.inference.graphs.traceable_ffn import TraceableFFN
from moe_dist.inference.merged_experts import refuse_merged_experts
from moe_dist.inference.sentence_directory import SentencePooling
from moe_dist.inference.silence import quiet_transformers
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing import CHOSEN_TASK, RoutingContext, use_context
from moe_dist.moe.task_routers import TaskGate, TaskTable
from moe_dist.tasks import model_kind

TASK_IDS, SENTENCE_VECTOR = "task_ids", "sentence_embedding"
_EXAMPLE_SIZE = (2, 5)


@dataclass(frozen=True)
class GraphSpec:
    """What a graph reads and gives.

    Attributes:
        inputs: names of int64 tensors (batch, length); `task_ids` is (batch,).
        outputs: names of float32 tensors; `SENTENCE_VECTOR`, of a model that makes vectors of
            texts, is pooled as its configuration says.
        output_class: of what the model's own forward gives.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_class: type[Any]


@dataclass(frozen=True)
class Trace:
    """A traced model, in float32.

    Attributes:
        program: of torch.export; takes `example`'s names, gives those of `spec.outputs`.
        spec: what it reads and gives.
        example: that it was traced with.
    """

    program: ExportedProgram
    spec: GraphSpec
    example: dict[str, Tensor]


def trace(model: Any, form: str) -> Trace:
    """Trace a model.

    A model of several tasks of which one is chosen is traced for that task. Otherwise its graph
    reads the tasks and gives the outputs of all heads.

    Args:
        model: on the CPU, dense or converted; it is left as it is.
        form: what the graph is for, in an error's words.

    Returns:
        The program, and what it reads and gives.

    Raises:
        ConversionError: if there is no such graph of the model; the message says why.
    """
    _refuse(model, form)
    own = _traceable(model)
    example = _example(own, _input_names(own))
    traced = _Traced(own)
    with clear_errors(own, form), torch.no_grad():
        output = traced.output(**example)
    outputs = [name for name, value in output.items() if isinstance(value, Tensor)]
    traced.outputs = tuple(outputs)
    pooling = SentencePooling.of(own.config)
    if pooling is not None and "last_hidden_state" in outputs:
        traced.pooling = pooling
        outputs.append(SENTENCE_VECTOR)
    free = torch.export.Dim.DYNAMIC
    sizes = {name: dict.fromkeys(range(one.dim()), free) for name, one in example.items()}
    with clear_errors(own, form), quiet_exporters(), torch.no_grad():
        program = torch.export.export(traced, (), example, dynamic_shapes=sizes, strict=False)
    return Trace(program, GraphSpec(tuple(example), tuple(outputs), type(output)), example)


class _Traced(nn.Module):
    """The model with tensors alone as its arguments and results, by name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.outputs: tuple[str, ...] = ()
        self.pooling: SentencePooling | None = None

    def output(self, task_ids: Tensor | None = None, **given: Any) -> Any:
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            given["use_cache"] = False
        with use_context(RoutingContext(task_ids=task_ids)):
            return self.model(**given, return_dict=True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        kinds = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.output(task_ids, input_ids=input_ids, attention_mask=attention_mask, **kinds)
        found = {name: output[name] for name in self.outputs}
        if self.pooling is not None:
            states = output["last_hidden_state"]
            found[SENTENCE_VECTOR] = self.pooling.vectors(states, attention_mask)
        return found


def _refuse(model: Any, form: str) -> None:
    refuse_merged_experts(model, form)
    if model.config.is_encoder_decoder and model_kind(model).writes:
        raise ConversionError(
            f"{type(model).__name__} writes its answers token by token, and the {form} form has "
            "no cache for that",
            remedy="use the eager or the lean form",
        )
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ConversionError(
            f"the {form} form is made on a CPU, and the model is on {device}",
            remedy="load it with device='cpu'",
        )


def _traceable(model: Any) -> Any:
    own = copy.deepcopy(model).eval().requires_grad_(False).float()
    if getattr(own, CHOSEN_TASK, None) is None:
        uninstall_heads(own)
    _replace(own)
    return own


def _replace(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        if isinstance(child, MoELayer):
            setattr(parent, name, TraceableFFN(child))
        else:
            _replace(child)


def _input_names(model: Any) -> list[str]:
    accepted = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in accepted and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    reads_tasks = any(isinstance(module, TaskGate | TaskTable) for module in model.modules())
    if reads_tasks and getattr(model, CHOSEN_TASK, None) is None:
        names.append(TASK_IDS)
    return names


def _example(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Texts to trace with: what they are decides nothing, and no size of theirs is 1."""
    ids_BS = torch.full(_EXAMPLE_SIZE, model.config.vocab_size - 1)
    end = ending_token(model)
    if end is not None:
        ids_BS[:, -1] = end
    values = {
        "input_ids": ids_BS,
        "attention_mask": torch.ones_like(ids_BS),
        "token_type_ids": torch.zeros_like(ids_BS),
        TASK_IDS: torch.zeros(_EXAMPLE_SIZE[0], dtype=torch.int64),
    }
    return {name: values[name] for name in names}


def ending_token(model: Any) -> int | None:
    """The token that a text must end with, where a classifier with two stacks reads its answer."""
    end = model.config.eos_token_id
    return end if model.config.is_encoder_decoder and isinstance(end, int) else None


@contextmanager
def clear_errors(model: Any, form: str) -> Iterator[None]:
    """Whatever an exporter says becomes a ConversionError with its reason."""
    try:
        yield
    # Whatever an architecture does that cannot be traced: torch has no one error for it.
    except Exception as error:
        reason = _reason(error)
        lacks_padding = "no padding token is defined" in reason
        raise ConversionError(
            f"torch cannot write {type(model).__name__} for {form}: {reason}",
            remedy="say its pad_token_id in config.json"
            if lacks_padding
            else "use the eager or the lean form",
        ) from error


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """What exporters say of their own workings is nothing that a user could act on."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
