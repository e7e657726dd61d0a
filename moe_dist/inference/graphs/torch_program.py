"""A traced model as a file that torch alone loads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._sympy.value_ranges import ValueRanges

from moe_dist.inference.graphs.graph_file import TEXTS, GraphFile, WeightBytes
from moe_dist.inference.graphs.graph_model import GraphModel, graph_model
from moe_dist.inference.graphs.nearness import check_nearness
from moe_dist.inference.graphs.tracing import GraphSpec, clear_errors, quiet_exporters, trace

_READER = f"""import json
import torch
from tokenizers import Tokenizer

facts = json.load(open("torch_export.json"))
tokenizer = Tokenizer.from_file("tokenizer.json")
model = torch.export.load(facts["graph"]).module()
rows = tokenizer.encode_batch({TEXTS})
columns = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
feed = {{
    name: torch.tensor([getattr(row, columns[name]) for row in rows])
    for name in facts["inputs"]
}}
with torch.no_grad():
    answers = model(**feed)"""
# Of a node, what names files of this machine.
_PLACES = ("stack_trace", "source_fn_stack", "torch_fn", "from_node")


class TorchExport:
    """A `GraphFormat` in float32: `torch.export.load` reads it."""

    title = "torch.export"
    graph, facts = "model.pt2", "torch_export.json"
    precisions: tuple[str, ...] = ("fp32",)
    reader = _READER

    def require(self) -> None:
        """Nothing beside torch is needed."""

    def write(self, model: Any, precision: str, path: Path) -> GraphFile:
        """Write, load what was written, and compare."""
        traced = trace(model, self.title)
        _clean(traced.program)
        spec, counts = traced.spec, _count_bytes(traced.program)
        # A disk that is full while torch writes ends the process.
        file = io.BytesIO()
        with clear_errors(model, self.title), quiet_exporters():
            torch.export.save(traced.program, file)
        del traced
        path.write_bytes(file.getbuffer())
        del file
        return GraphFile(spec, counts, check_nearness(model, open_program(model, path, spec)))


def open_program(model: Any, path: Path, spec: GraphSpec) -> GraphModel:
    """Load a file that was just written.

    Args:
        model: that it was made of.
        path: of the file.
        spec: what it reads and gives.

    Returns:
        What answers in the model's place.
    """
    with quiet_exporters():
        program: Any = torch.export.load(path).module()

    def run(names: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = program(**inputs)
        return {name: found[name] for name in names}

    return graph_model(model, TorchExport.title, run, spec)


def _clean(program: ExportedProgram) -> None:
    """Take out the example, what names this machine, and guesses of sizes that data decide.

    Of these torch keeps what it believed while it traced, such as that two texts end in at least
    two tokens: one text would be refused.
    """
    # As a pickle is what it would be kept.
    program.example_inputs = None
    for part in program.graph_module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in list(part.graph.nodes):
            for name in _PLACES:
                node.meta.pop(name, None)
            if node.target is torch.ops.aten._assert_scalar.default:
                part.graph.erase_node(node)
        part.graph.eliminate_dead_code()
        part.recompile()
    used = {size for node in program.graph.nodes for size in free_symbols(node.meta.get("val"))}
    for size, bounds in list(program.range_constraints.items()):
        if size in used:
            program.range_constraints[size] = ValueRanges(min(bounds.lower, 0), bounds.upper)
        else:
            del program.range_constraints[size]


def _count_bytes(program: ExportedProgram) -> WeightBytes:
    """Count what is held; tied weights, which are held once, once."""
    held = [*program.state_dict.values(), *program.constants.values()]
    tensors = {one.data_ptr(): one for one in held if isinstance(one, Tensor)}
    counts = {True: 0, False: 0}
    for one in tensors.values():
        counts[one.dtype.is_floating_point] += one.numel() * one.element_size()
    return WeightBytes(int8=0, fp32=counts[True], integers=counts[False])
