"""The model as a graph in ONNX Runtime, in float32 or with weights in int8."""

from __future__ import annotations

from typing import Any


class Onnx:
    """Answers alone: no cache, no hidden states of layers; merged experts have no such form."""

    precisions: tuple[str, ...] = ("fp32", "int8")
    is_quick = False

    def prepare(self, model: Any, precision: str) -> Any:
        """Write and load the graph; it has as many threads as torch has at that moment."""
        # What the libraries need is loaded for those who want it.
        from moe_dist.inference.graphs.onnx_session import onnx_model

        return onnx_model(model, precision)
