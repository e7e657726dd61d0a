"""A directory to answer from with `tokenizers` and what runs the graph alone."""

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
from moe_dist.inference.graphs.graph_file import GraphFile, GraphFormat
from moe_dist.inference.graphs.tracing import TASK_IDS
from moe_dist.tasks import TaskKind, model_kind
from moe_dist.tasks.embedding import MAX_LENGTH


@dataclass(frozen=True)
class GraphFacts:
    """What was written.

    Attributes:
        title: of the format.
        precision: of the products' weights.
        task: the kind of task, such as classification.
        labels: the classes in the order of the outputs; none where there are none.
        max_length: tokens after which the directory's tokenizer cuts a text; None for no limit.
        file: the graph.
    """

    title: str
    precision: str
    task: str
    labels: tuple[str, ...]
    max_length: int | None
    file: GraphFile


def write_directory(
    model: Any, tokenizer: Any, form: GraphFormat, precision: str, directory: Path
) -> GraphFacts:
    """Fill an empty directory with a graph, its tokenizer, configuration and a file of facts.

    Args:
        model: on the CPU; of several tasks, one must have been chosen.
        tokenizer: fits it; a fast one.
        form: of the graph.
        precision: one of the format's.
        directory: where to write.

    Returns:
        What was written.

    Raises:
        ConversionError: if the model has no such form, or the graph answers otherwise.
        MissingInputError: if no task was chosen.
    """
    kind = answered_kind(model)
    if not getattr(tokenizer, "is_fast", False):
        raise ConversionError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which the library tokenizers reads",
            remedy="save the model with the fast tokenizer of its family",
        )
    written = form.write(model, precision, directory / form.graph)
    max_length = _write_tokenizer(model, tokenizer, directory)
    facts = GraphFacts(form.title, precision, kind.name, class_names(model), max_length, written)
    _write_json(directory / "config.json", _config(model, facts.labels))
    _write_json(directory / form.facts, _as_json(form, facts))
    return facts


def answered_kind(model: Any) -> TaskKind:
    """The kind of the one task that a model answers; a MissingInputError where none is chosen."""
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


def class_names(model: Any) -> tuple[str, ...]:
    """Names of the classes of the one task that a model answers; none where it has none."""
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
    moe: dict[str, Any] = config.pop("moe", None) or {}
    # A converted model's own names of its activation are no activation's.
    config |= moe.get("activation", {})
    for name in (HEADS, "_name_or_path"):
        config.pop(name, None)
    config["dtype"] = "float32"
    if labels:
        config["id2label"] = {str(number): label for number, label in enumerate(labels)}
        config["label2id"] = {label: number for number, label in enumerate(labels)}
    return config


def _write_tokenizer(model: Any, tokenizer: Any, directory: Path) -> int | None:
    """Write tokenizer.json so that it pads and cuts by itself; gives where it cuts."""
    from tokenizers import Tokenizer

    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer.json"
    own = Tokenizer.from_file(str(path))
    max_length = length_limit(model, tokenizer)
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


def length_limit(model: Any, tokenizer: Any) -> int | None:
    """Tokens after which a model's texts have to be cut; None for no limit."""
    limits = (tokenizer.model_max_length, position_limit(model), _sentence_limit(model))
    # Tokenizers without a limit write a number beyond any text.
    return min((int(n) for n in limits if n is not None and n < 10**6), default=None)


def _sentence_limit(model: Any) -> int | None:
    limit: int | None = getattr(model.config, MAX_LENGTH, None)
    return limit


def _as_json(form: GraphFormat, facts: GraphFacts) -> dict[str, Any]:
    spec = facts.file.spec
    return {
        "format_version": 1,
        "made_by": f"moe-dist {__version__}, torch {torch.__version__.partition('+')[0]}",
        "graph": form.graph,
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
        "bytes": asdict(facts.file.bytes),
        "difference_from_model": asdict(facts.file.nearness),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
