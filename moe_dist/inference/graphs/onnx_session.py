"""A model's graph in ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.inference.graphs.graph_model import GraphModel, graph_model
from moe_dist.inference.graphs.nearness import check_nearness
from moe_dist.inference.graphs.onnx_graph import TITLE, write_graph
from moe_dist.inference.graphs.onnx_weights import quantize
from moe_dist.inference.graphs.tracing import GraphSpec


def onnx_model(model: Any, precision: str) -> GraphModel:
    """Bring a model on the CPU into ONNX Runtime; what has no such form is a ConversionError."""
    with tempfile.TemporaryDirectory(prefix="moe-dist-onnx-") as scratch:
        path = Path(scratch) / "model.onnx"
        spec = write_graph(model, path)
        found = open_graph(model, path, spec)
        check_nearness(model, found)
        if precision == "fp32":
            return found
        quantize(path, path.with_name("int8.onnx"))
        return open_graph(model, path.with_name("int8.onnx"), spec)


def open_graph(model: Any, path: Path, spec: GraphSpec) -> GraphModel:
    """Load a graph, to answer in the place of the model that it was made of."""
    session = open_session(path)

    def run(names: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        feed = {name: value.contiguous().numpy() for name, value in inputs.items()}
        arrays = session.run(names, feed)
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return graph_model(model, TITLE, run, spec)


def open_session(path: Path) -> Any:
    """Load a graph into ONNX Runtime, with as many threads as torch has now."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Threads that wait for more work would hold up whatever runs next on their cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
