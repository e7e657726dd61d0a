"""Graphs for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_dist.inference.graphs.graph_file import TEXTS, GraphFile
from moe_dist.inference.graphs.nearness import check_nearness, measure_nearness
from moe_dist.inference.graphs.onnx_graph import TITLE, require_onnx, write_graph
from moe_dist.inference.graphs.onnx_session import open_graph
from moe_dist.inference.graphs.onnx_weights import count_bytes, quantize

_READER = f"""import json
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

facts = json.load(open("onnx.json"))
tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession(facts["graph"])
rows = tokenizer.encode_batch({TEXTS})
columns = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
feed = {{
    name: np.array([getattr(row, columns[name]) for row in rows], np.int64)
    for name in facts["inputs"]
}}
answers = dict(zip(facts["outputs"], session.run(list(facts["outputs"]), feed)))"""


class OnnxFormat:
    """A `GraphFormat`; weights in float32 or int8."""

    title = TITLE
    graph, facts = "model.onnx", "onnx.json"
    precisions: tuple[str, ...] = ("fp32", "int8")
    reader = _READER

    def require(self) -> None:
        """See that ONNX Runtime and the exporter are there."""
        require_onnx()

    def write(self, model: Any, precision: str, path: Path) -> GraphFile:
        """Write and compare; in int8 the difference is measured, and no error."""
        spec = write_graph(model, path)
        nearness = check_nearness(model, open_graph(model, path, spec))
        if precision == "int8":
            _to_int8(path)
            nearness = measure_nearness(model.float(), open_graph(model, path, spec))
        return GraphFile(spec, count_bytes(path), nearness)


def _to_int8(path: Path) -> None:
    """Put the graph in int8 in the place of the one in float32, and of the weights beside that."""
    beside = path.with_name("int8.onnx")
    quantize(path, beside)
    for old in (path, Path(f"{path}.data")):
        old.unlink(missing_ok=True)
    beside.rename(path)
