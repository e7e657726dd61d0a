"""The formats of graphs, by the name that `moe-dist export --format` takes."""

from __future__ import annotations

from moe_dist.inference.graphs.graph_file import GraphFormat
from moe_dist.inference.graphs.onnx_format import OnnxFormat
from moe_dist.inference.graphs.torch_program import TorchExport

FORMATS: dict[str, GraphFormat] = {"onnx": OnnxFormat(), "torch-export": TorchExport()}
