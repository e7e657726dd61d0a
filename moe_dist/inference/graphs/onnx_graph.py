"""A traced model as a file of ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_dist.errors import MissingInputError
from moe_dist.inference.graphs.tracing import GraphSpec, clear_errors, quiet_exporters, trace

TITLE = "ONNX"
OPSET = 20
"""The first one with GELU as one operator."""
LARGEST_FILE = 2**30
"""Bytes of weights above which they lie beside the graph: a file of protobuf ends at 2 GiB."""


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

    Args:
        model: on the CPU, dense or converted, as `trace` takes it.
        path: of the graph.

    Returns:
        What the graph reads and gives.

    Raises:
        ConversionError: if there is no such graph of the model; the message says why.
    """
    require_onnx()
    traced = trace(model, TITLE)
    with clear_errors(model, TITLE), quiet_exporters(), torch.no_grad():
        program = torch.onnx.export(
            traced.program,
            (),
            kwargs=traced.example,
            dynamo=True,
            input_names=list(traced.spec.inputs),
            output_names=list(traced.spec.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    _remove_paths(program.model)
    weights = traced.program.state_dict.values()
    num_bytes = sum(one.numel() * one.element_size() for one in weights)
    program.save(path, external_data=num_bytes > LARGEST_FILE)
    return traced.spec


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
