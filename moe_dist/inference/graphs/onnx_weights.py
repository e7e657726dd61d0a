"""Weights of a graph in int8, and how many bytes are of which precision.

Products with a weight are in integers: weights with a scale for each output, rounded once; rows
with one scale for all that stand in a call, found in the call. Tables of embeddings have a scale
for each row, and their rows are brought back to float32 when they are looked up.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_dist.errors import ConversionError
from moe_dist.inference.graphs.graph_file import WeightBytes
from moe_dist.inference.graphs.onnx_graph import LARGEST_FILE
from moe_dist.inference.graphs.tracing import quiet_exporters

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_ROUTER = ".router."
_MOST = 127
_PRODUCTS = ("MatMul", "Gemm")


def count_bytes(path: Path) -> WeightBytes:
    """Count what a graph's file, and the one beside it, hold."""
    import onnx

    counts = {"int8": 0, "fp32": 0, "integers": 0}
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        size = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        count = int(np.prod(tensor.dims, dtype=np.int64)) * size
        # Zero points of weights are int8 too, and none of them matters.
        name = {onnx.TensorProto.INT8: "int8", onnx.TensorProto.FLOAT: "fp32"}
        counts[name.get(tensor.data_type, "integers")] += count
    return WeightBytes(**counts)


def quantize(source: Path, target: Path) -> WeightBytes:
    """Write a graph with weights in int8; routers stay in float32, so that they choose alike.

    Weights have 7 bits of the 8: with all of them, sums of products overflow on processors without
    VNNI, where a file may well be used.

    Args:
        source: the graph in float32.
        target: where the other goes.

    Returns:
        What it holds.

    Raises:
        ConversionError: if the weight of a product would stay in float32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    num_bytes = count_bytes(source).total
    if num_bytes > 2 * LARGEST_FILE:
        raise ConversionError(
            f"the model has {num_bytes / 2**30:.1f} GiB of weights, and ONNX Runtime's quantizer "
            "takes 2",
            remedy="export with --precision fp32, or use the lean form",
        )
    model = onnx.load(source)
    _quantize_tables(model)
    kept = [node.name for node in model.graph.node if _is_of_router(node)]
    with quiet_exporters():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=list(_PRODUCTS),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
        )
    _check(target)
    return count_bytes(target)


def _is_of_router(node: NodeProto) -> bool:
    return node.op_type in _PRODUCTS and any(_ROUTER in name for name in node.input)


def _quantize_tables(model: ModelProto) -> None:
    """Give each table of embeddings, which no quantizer takes row by row, a scale for each row."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tables = {
        one.name: one
        for one in graph.initializer
        if one.data_type == TensorProto.FLOAT and len(one.dims) == 2 and _ROUTER not in one.name
    }
    nodes: list[Any] = []
    done: set[str] = set()
    for node in graph.node:
        name = node.input[0] if node.input else ""
        if node.op_type != "Gather" or name not in tables or _axis(node) != 0:
            nodes.append(node)
            continue
        if name not in done:
            done.add(name)
            rows_VD = numpy_helper.to_array(tables[name])
            scale_V1 = np.abs(rows_VD).max(axis=1, keepdims=True) / _MOST
            safe_V1 = np.where(scale_V1 > 0, scale_V1, 1)
            numbers_VD = np.rint(rows_VD / safe_V1).astype(np.int8)
            graph.initializer.append(numpy_helper.from_array(numbers_VD, f"{name}_int8"))
            graph.initializer.append(
                numpy_helper.from_array(scale_V1.astype(np.float32), f"{name}_scale_of_row")
            )
        out = node.output[0]
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", node.input[1]], [f"{out}_int8"]),
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_cast"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}_scale_of_row", node.input[1]], [f"{out}_scale"]),
            helper.make_node("Mul", [f"{out}_cast", f"{out}_scale"], [out]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in graph.node for name in node.input}
    unused = [one for one in graph.initializer if one.name in done and one.name not in read]
    for one in unused:
        graph.initializer.remove(one)
    onnx.checker.check_model(model, full_check=False)


def _axis(node: NodeProto) -> int:
    return next((one.i for one in node.attribute if one.name == "axis"), 0)


def _check(path: Path) -> None:
    """See that no product, such as one of an expert, was passed over."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    real = {
        one.name
        for one in model.graph.initializer
        if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) >= 2
    }
    left = [
        name
        for node in model.graph.node
        if not _is_of_router(node) and node.op_type in (*_PRODUCTS, "Transpose", "Slice", "Gather")
        for name in node.input
        if name in real and not name.endswith("_scale_of_row")
    ]
    if left:
        raise ConversionError(
            f"ONNX Runtime's quantizer leaves {len(left)} weights in float32, such as {left[0]}",
            remedy="export with --precision fp32, or use the lean form",
        )
