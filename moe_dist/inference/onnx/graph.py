"""A model as an ONNX graph whose batch and length are free, and whose routing follows the data."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.heads import uninstall_heads
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference.onnx.traceable_ffn import TraceableFFN
from moe_dist.inference.sentence_directory import SentencePooling
from moe_dist.inference.silence import quiet_transformers
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing import CHOSEN_TASK, RoutingContext, use_context
from moe_dist.moe.task_routers import TaskGate, TaskTable
from moe_dist.tasks import model_kind

TASK_IDS, SENTENCE_VECTOR = "task_ids", "sentence_embedding"
OPSET = 20
"""The first one with GELU as one operator."""
_EXAMPLE_SIZE = (2, 5)
LARGEST_FILE = 2**30
"""Bytes of weights above which they lie beside the graph: a file of protobuf ends at 2 GiB."""


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


def require_onnx() -> None:
    """See that the libraries are there; else a MissingInputError names what to install."""
    import importlib

    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingInputError(
                f"ONNX needs the package {name}, which is not here ({error})",
                remedy="install it with: pip install 'moe-dist[onnx]'",
            ) from error


def write_graph(model: Any, path: Path) -> GraphSpec:
    """Write a model as `path`, in float32; large weights as `path` with `.data` at its end.

    A model of several tasks of which one is chosen is written for that task. Otherwise its graph
    reads the tasks and gives the outputs of all heads.

    Args:
        model: on the CPU, dense or converted; it is left as it is.
        path: of the graph.

    Returns:
        What the graph reads and gives.

    Raises:
        ConversionError: if there is no such graph of the model; the message says why.
    """
    require_onnx()
    _refuse(model)
    own = _traceable(model)
    inputs = _input_names(own)
    example = _example(own, inputs)
    traced = _Traced(own, inputs)
    with _clear_errors(own), torch.no_grad():
        output = traced.output(*example.values())
    outputs = [name for name, value in output.items() if isinstance(value, Tensor)]
    traced.outputs = tuple(outputs)
    pooling = SentencePooling.of(own.config)
    if pooling is not None and "last_hidden_state" in outputs:
        traced.pooling = pooling
        outputs.append(SENTENCE_VECTOR)
    _write(traced, example, outputs, path)
    return GraphSpec(tuple(inputs), tuple(outputs), type(output))


class _Traced(nn.Module):
    """The model with tensors alone, in a fixed order, as its arguments and results."""

    def __init__(self, model: Any, inputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs: tuple[str, ...] = ()
        self.pooling: SentencePooling | None = None

    def output(self, *tensors: Tensor) -> Any:
        given: dict[str, Any] = dict(zip(self.inputs, tensors, strict=True))
        context = RoutingContext(task_ids=given.pop(TASK_IDS, None))
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            given["use_cache"] = False
        with use_context(context):
            return self.model(**given, return_dict=True)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = self.output(*tensors)
        found = [output[name] for name in self.outputs]
        if self.pooling is not None:
            mask_BS = tensors[self.inputs.index("attention_mask")]
            found.append(self.pooling.vectors(output["last_hidden_state"], mask_BS))
        return tuple(found)


def _refuse(model: Any) -> None:
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    merging = [layer.name for layer in layers if layer.merges]
    if merging:
        raise ConversionError(
            f"{merging[0]} merges its experts, which has no ONNX form",
            remedy="make a dense model of a task first, with `moe-dist export DIR --fold`, and "
            "take that",
        )
    if model.config.is_encoder_decoder and model_kind(model).writes:
        raise ConversionError(
            f"{type(model).__name__} writes its answers token by token, and the ONNX form has no "
            "cache for that",
            remedy="use the eager or the lean form",
        )
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ConversionError(
            f"the ONNX form is for a CPU, and the model is on {device}",
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


def _write(traced: _Traced, example: dict[str, Tensor], outputs: list[str], path: Path) -> None:
    free = torch.export.Dim.DYNAMIC
    sizes = tuple(dict.fromkeys(range(one.dim()), free) for one in example.values())
    with _clear_errors(traced.model), quiet_exporters(), torch.no_grad():
        program = torch.onnx.export(
            traced,
            tuple(example.values()),
            dynamo=True,
            dynamic_shapes=(sizes,),
            input_names=list(example),
            output_names=outputs,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    _remove_paths(program.model)
    num_bytes = sum(one.numel() * one.element_size() for one in traced.parameters())
    program.save(path, external_data=num_bytes > LARGEST_FILE)


def _remove_paths(model: Any) -> None:
    """Take out where each node was traced, which names directories of this machine."""
    model.metadata_props.clear()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


@contextmanager
def _clear_errors(model: Any) -> Iterator[None]:
    try:
        yield
    # Whatever an architecture does that cannot be traced: torch has no one error for it.
    except Exception as error:
        raise ConversionError(
            f"torch cannot write {type(model).__name__} as an ONNX graph: {_reason(error)}",
            remedy="use the eager or the lean form",
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
