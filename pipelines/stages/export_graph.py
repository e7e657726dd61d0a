"""export --format onnx or torch-export: a model as a graph, with what readers must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import ConfigError, MissingInputError, MoeDistError

from ..chain.stage_recovery import stage_of
from ..report.model_card import graph_subject, write_card
from ..report.run_knowledge import read_run

if TYPE_CHECKING:
    from moe_dist.inference.graphs.directory import GraphFacts


@dataclass(frozen=True)
class ExportedGraph:
    """What was written.

    Attributes:
        directory: of the graph.
        facts: what it is, and how far it lies from the model.
        num_bytes: of all files.
    """

    directory: Path
    facts: GraphFacts
    num_bytes: int


def default_graph_output(directory: Path, task: str | None, form: str, precision: str) -> Path:
    """Choose a place for the graph: beside the model's directory, or its stage.

    A graph of what was exported itself has that one's name too.
    """
    name = directory.name if directory.name.startswith("export-") else "export"
    words = [name, *stage_words(directory), *([task] if task else []), form, precision]
    return beside_model(directory) / "-".join(words)


def beside_model(directory: Path) -> Path:
    """Where an export of a model goes: beside its stage, or beside the directory itself."""
    stage = stage_of(directory)
    return directory.parent if stage is None else stage.parent


def stage_words(directory: Path) -> list[str]:
    """Say in an export's name which stage made RUN/STAGE/model, as a run has several; else none."""
    is_stages = directory.name == "model" and stage_of(directory) == directory.parent
    return [directory.parent.name] if is_stages else []


def export_graph(
    directory: Path, task: str | None, output: Path, form: str, precision: str
) -> ExportedGraph:
    """Write a model as a graph, for one task.

    Args:
        directory: of a model, dense or with experts.
        task: its name; None for a model of one task.
        output: where the graph goes.
        form: one of `FORMATS`.
        precision: one of the format's.

    Returns:
        What was written.

    Raises:
        ConfigError: if the format has no such precision.
        MoeDistError: if the output is there already or cannot be written, or the model has no
            such graph.
    """
    from moe_dist.conversion.extract import extract_task
    from moe_dist.inference import load_model, load_tokenizer
    from moe_dist.inference.graphs.directory import write_directory
    from moe_dist.inference.graphs.formats import FORMATS
    from moe_dist.inference.saving import model_directory
    from moe_dist.router_spec import router_facts

    kind = FORMATS[form]
    if precision not in kind.precisions:
        raise ConfigError(
            [f"--format {form} has --precision {' or '.join(kind.precisions)}, not {precision}."],
            source="export",
        )
    kind.require()
    check_free(output)
    known = read_run(directory)
    model = load_model(directory, task=task)
    tokenizer = load_tokenizer(directory)
    check_task(model, task)
    moe = getattr(model.config, "moe", None)
    if moe and moe["num_experts"] > 1 and not router_facts(moe["router"]).merges:
        by_task = router_facts(moe["router"]).chooses_by == "task"
        # The other experts of such a router are never used for the task.
        model = extract_task(model, task) if by_task else model
    with model_directory(output) as unfinished:
        facts = write_directory(model, tokenizer, kind, precision, unfinished)
        subject = graph_subject(model, facts, kind.reader)
        num_bytes = write_card(known, task, subject, unfinished)
    return ExportedGraph(output, facts, num_bytes)


def check_task(model: Any, task: str | None) -> None:
    """See that a model whose routers tell tasks apart has names for them; else an error."""
    from moe_dist.conversion.heads import read_heads

    moe = getattr(model.config, "moe", None) or {}
    if task is None and (moe.get("num_tasks") or 1) > 1 and not read_heads(model):
        raise MissingInputError(
            f"the model's routers know {moe['num_tasks']} tasks, of which none has a name",
            remedy="name them in the model (moe_dist.conversion.heads.set_heads), save it again, "
            "and say which one",
        )


def check_free(output: Path) -> None:
    """See that nothing is in the output's place; else a MoeDistError."""
    if output.exists() and any(output.iterdir() if output.is_dir() else (output,)):
        raise MoeDistError(
            f"{output} is there already.", remedy="remove it, or choose another with --output."
        )
