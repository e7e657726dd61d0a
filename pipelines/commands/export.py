"""The command `export`: a plain dense model of one task, or a graph for ONNX Runtime."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command_line import Debug, Overrides, Quiet, clean_errors, quieten_libraries, shown_warnings

if TYPE_CHECKING:
    from ..console import Console


class Format(StrEnum):
    """What a model is written as."""

    HF = "hf"
    ONNX = "onnx"


class Precision(StrEnum):
    """Of the weights of a graph."""

    FP32 = "fp32"
    INT8 = "int8"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("export")(export)


def export(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A model's directory."),
    ],
    task: Annotated[
        str | None, typer.Option(help="The task; not needed for a model of one task.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the dense model goes; beside its stage, or DIR, if not given."),
    ] = None,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold", help="Insist that merged experts become one, as they are for the task."
        ),
    ] = False,
    average: Annotated[
        bool,
        typer.Option(
            "--average",
            help="Take the average of all experts, which is another model, and measure both.",
        ),
    ] = False,
    format: Annotated[
        Format,
        typer.Option(
            help="A dense model for transformers, or a graph for ONNX Runtime, with all experts."
        ),
    ] = Format.HF,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of the graph's weights; fp32 if not given.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Whose dev rows --average is measured on; that of the model's run if not given."
        ),
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Take one task's sub-network out of a model, or write the model for ONNX Runtime."""
    with clean_errors(debug=debug, stopped="nothing was written"):
        quieten_libraries()
        from moe_dist.config import load_config
        from moe_dist.errors import ConfigError

        from ..console import Console
        from ..stages.compaction import find_recipe
        from ..stages.export import Way, default_output, export_task

        if fold and average:
            raise ConfigError(
                ["--fold and --average are two models; leave one out."], source="export"
            )
        if not average and (recipe is not None or overrides):
            raise ConfigError(
                ["--recipe and --set say what --average is measured on; leave them out."],
                source="export",
            )
        way: Way = "fold" if fold else "average" if average else "extract"
        console = Console(quiet=quiet)
        source = directory.absolute()
        if format is Format.ONNX:
            if fold or average:
                raise ConfigError(
                    [
                        "--fold and --average make dense models; export such a one first, and then "
                        "that with --format onnx."
                    ],
                    source="export",
                )
            _export_graph(source, task, output, (precision or Precision.FP32).value, console)
            return
        if precision is not None:
            raise ConfigError(
                ["--precision is that of --format onnx; leave it out."], source="export"
            )
        config = None
        if average:
            path = recipe or find_recipe(source, "the average is measured on dev rows")
            config = load_config(path, overrides or ())
        place = (output or default_output(source, task, way)).absolute()
        with shown_warnings(console):
            found = export_task(source, task, place, way=way, config=config)
        console.result(
            f"{found.kind}, {found.num_parameters:,} parameters, {found.ffn_size} neurons in each "
            f"feed-forward layer; its outputs differ by at most {found.difference:.1e}"
        )
        if found.left_out:
            console.warn(f"left out: {found.left_out}")
        for name, value in found.metrics.get("export", {}).items():
            title = found.metric_titles.get(name, name)
            console.result(
                f"dev {title}: {value:.4f}, and {found.metrics['model'][name]:.4f} of the model"
            )
        console.result(f"model: {found.directory}")


def _export_graph(
    source: Path, task: str | None, output: Path | None, precision: str, console: Console
) -> None:
    from ..stages.export_onnx import default_graph_output, export_graph

    place = (output or default_graph_output(source, task, precision)).absolute()
    with shown_warnings(console):
        found = export_graph(source, task, place, precision)
    facts, weights = found.facts, found.facts.bytes
    console.result(
        f"{facts.task}, reads {', '.join(facts.spec.inputs)}, gives "
        f"{', '.join(facts.spec.outputs)}; {found.num_bytes / 1e6:.1f} MB"
    )
    console.result(
        f"weights: {weights.int8 / 1e6:.2f} MB in int8 ({weights.share_int8:.1%}), "
        f"{weights.fp32 / 1e6:.2f} MB in float32, {weights.integers / 1e6:.2f} MB of whole numbers"
    )
    console.result(
        f"answers differ by at most {facts.nearness.largest:.1e} of the largest from the model's "
        f"own, {facts.nearness.mean:.1e} on average, on random tokens in other shapes than the "
        "example's"
    )
    console.result(f"graph: {found.directory}")
