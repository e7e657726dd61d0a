"""A directory to answer from with ONNX Runtime, `tokenizers` and NumPy alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_dist import __version__
from moe_dist.conversion.families import position_limit
from moe_dist.conversion.heads import KEY as HEADS
from moe_dist.conversion.heads import chosen_head, read_heads
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference.onnx.graph import TASK_IDS, GraphSpec, write_graph
from moe_dist.inference.onnx.nearness import Nearness, check_nearness, measure_nearness
from moe_dist.inference.onnx.session import open_graph
from moe_dist.inference.onnx.weights import WeightBytes, count_bytes, quantize
from moe_dist.tasks import TaskKind, model_kind
from moe_dist.tasks.embedding import MAX_LENGTH

GRAPH, FACTS = "model.onnx", "onnx.json"


@dataclass(frozen=True)
class OnnxFacts:
    """What was written.

    Attributes:
        precision: of the products' weights.
        task: the kind of task, such as classification.
        labels: the classes in the order of the outputs; none where there are none.
        spec: what the graph reads and gives.
        max_length: tokens after which the directory's tokenizer cuts a text; None for no limit.
        bytes: of the graph's numbers.
        nearness: of its answers to those of the model in eager float32.
    """

    precision: str
    task: str
    labels: tuple[str, ...]
    spec: GraphSpec
    max_length: int | None
    bytes: WeightBytes
    nearness: Nearness


def write_onnx(model: Any, tokenizer: Any, precision: str, directory: Path) -> OnnxFacts:
    """Fill an empty directory with a graph, its tokenizer, configuration and `onnx.json`.

    Args:
        model: on the CPU; of several tasks, one must have been chosen.
        tokenizer: fits it; a fast one.
        precision: "fp32" or "int8".
        directory: where to write.

    Returns:
        What was written.

    Raises:
        ConversionError: if the model has no such form, or the graph answers otherwise.
        MissingInputError: if no task was chosen.
    """
    kind = _kind(model)
    if not getattr(tokenizer, "is_fast", False):
        raise ConversionError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which the library tokenizers reads",
            remedy="save the model with the fast tokenizer of its family",
        )
    path = directory / GRAPH
    spec = write_graph(model, path)
    nearness = check_nearness(model, open_graph(model, path, spec))
    if precision == "int8":
        _to_int8(path)
        nearness = measure_nearness(model.float(), open_graph(model, path, spec))
    max_length = _write_tokenizer(model, tokenizer, directory)
    facts = OnnxFacts(
        precision, kind.name, _labels(model), spec, max_length, count_bytes(path), nearness
    )
    _write_json(directory / "config.json", _config(model, facts.labels))
    _write_json(directory / FACTS, _as_json(facts))
    return facts


def _kind(model: Any) -> TaskKind:
    head = chosen_head(model)
    if head is not None:
        return head.kind
    names = ", ".join(one.name for one in read_heads(model))
    if names:
        raise MissingInputError(
            f"the model answers several tasks ({names}), and a graph is made for one of them",
            remedy="name it with --task",
        )
    return model_kind(model)


def _labels(model: Any) -> tuple[str, ...]:
    head = chosen_head(model)
    if head is not None:
        return head.label_names or ()
    if not model_kind(model).has_classes:
        return ()
    return tuple(str(model.config.id2label[index]) for index in range(model.config.num_labels))


def _config(model: Any, labels: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of the architecture, with the outputs of the one task."""
    config: dict[str, Any] = model.config.to_dict()
    config["model_type"] = model.config.model_type.removeprefix("moe_")
    config["architectures"] = [type(model).__name__.removeprefix("Moe")]
    config.pop(HEADS, None)
    if labels:
        config["id2label"] = {str(number): label for number, label in enumerate(labels)}
        config["label2id"] = {label: number for number, label in enumerate(labels)}
    return config


def _to_int8(path: Path) -> None:
    """Put the graph in int8 in the place of the one in float32, and of the weights beside that."""
    beside = path.with_name("int8.onnx")
    quantize(path, beside)
    for old in (path, Path(f"{path}.data")):
        old.unlink(missing_ok=True)
    beside.rename(path)


def _write_tokenizer(model: Any, tokenizer: Any, directory: Path) -> int | None:
    """Write tokenizer.json so that it pads and cuts by itself; gives where it cuts."""
    from tokenizers import Tokenizer

    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer.json"
    own = Tokenizer.from_file(str(path))
    limits = (tokenizer.model_max_length, position_limit(model), _sentence_limit(model))
    # Tokenizers without a limit write a number beyond any text.
    max_length = min((int(n) for n in limits if n is not None and n < 10**6), default=None)
    own.no_truncation()
    if max_length is not None:
        own.enable_truncation(max_length, direction=tokenizer.truncation_side)
    own.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id or 0,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token or "",
    )
    own.save(str(path))
    return max_length


def _sentence_limit(model: Any) -> int | None:
    limit: int | None = getattr(model.config, MAX_LENGTH, None)
    return limit


def _as_json(facts: OnnxFacts) -> dict[str, Any]:
    spec = facts.spec
    return {
        "format_version": 1,
        "made_by": f"moe-dist {__version__}, torch {torch.__version__.partition('+')[0]}",
        "graph": GRAPH,
        "precision": facts.precision,
        "task": facts.task,
        "labels": list(facts.labels),
        "inputs": {
            name: {
                "dtype": "int64",
                "shape": ["batch"] if name == TASK_IDS else ["batch", "length"],
            }
            for name in spec.inputs
        },
        "outputs": {name: {"dtype": "float32"} for name in spec.outputs},
        "max_length": facts.max_length,
        "bytes": asdict(facts.bytes),
        "difference_from_model": asdict(facts.nearness),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
