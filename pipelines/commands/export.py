"""The command `export`: a model for transformers, or a graph for ONNX Runtime or torch alone."""

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
    DENSE = "dense"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


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
        typer.Option(help="Where it goes; beside the model's stage, or DIR, if not given."),
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
            help="hf: for transformers, dense where a dense model does the same, else with its "
            "experts; dense: that alone; onnx: a graph for ONNX Runtime; torch-export: one for "
            "torch."
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
    """Write a model for transformers, for ONNX Runtime or for torch alone."""
    with clean_errors(debug=debug, stopped="nothing was written"):
        quieten_libraries()
        from moe_dist.config import load_config
        from moe_dist.errors import ConfigError

        from ..console import Console
        from ..stages.compaction import find_recipe
        from ..stages.export import Way, default_output, export_task, keeps_experts

        source = directory.absolute()
        way: Way = "fold" if fold else "average" if average else "extract"
        if format is Format.HF and way == "extract" and keeps_experts(source):
            way = "whole"
        is_graph = format in (Format.ONNX, Format.TORCH_EXPORT)
        faults = [
            fault
            for is_wrong, fault in (
                (fold and average, "--fold and --average are two models; leave one out."),
                (
                    not average and (recipe is not None or overrides),
                    "--recipe and --set say what --average is measured on; leave them out.",
                ),
                (
                    is_graph and (fold or average),
                    "--fold and --average make dense models; export such a one first, and then "
                    f"that with --format {format.value}.",
                ),
                (
                    not is_graph and precision is not None,
                    "--precision is that of a graph (--format onnx or torch-export); leave it out.",
                ),
                (
                    way == "whole" and task is not None,
                    "The tokens of one task go to different experts, so the student is written "
                    "with all of its tasks; leave --task out.",
                ),
            )
            if is_wrong
        ]
        if faults:
            raise ConfigError(faults, source="export")
        console = Console(quiet=quiet)
        if is_graph:
            weights = (precision or Precision.FP32).value
            _export_graph(source, task, output, format.value, weights, console)
            return
        config = None
        if average:
            path = recipe or find_recipe(source, "the average is measured on dev rows")
            config = load_config(path, overrides or ())
        place = (output or default_output(source, task, way)).absolute()
        with shown_warnings(console):
            found = export_task(source, task, place, way=way, config=config)
        console.result(
            f"{found.kind}, {found.num_parameters:,} parameters, {found.ffn}; "
            + (
                "it is the model itself, and transformers reads it after `import moe_dist`"
                if way == "whole"
                else f"its outputs differ by at most {found.difference:.1e}"
            )
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
    source: Path,
    task: str | None,
    output: Path | None,
    form: str,
    precision: str,
    console: Console,
) -> None:
    from ..stages.export_graph import default_graph_output, export_graph

    place = (output or default_graph_output(source, task, form, precision)).absolute()
    with shown_warnings(console):
        found = export_graph(source, task, place, form, precision)
    facts, written = found.facts, found.facts.file
    console.result(
        f"{facts.task}, reads {', '.join(written.spec.inputs)}, gives "
        f"{', '.join(written.spec.outputs)}; {found.num_bytes / 1e6:.1f} MB"
    )
    weights = written.bytes
    console.result(
        f"weights: {weights.int8 / 1e6:.2f} MB in int8 ({weights.share_int8:.1%}), "
        f"{weights.fp32 / 1e6:.2f} MB in float32, {weights.integers / 1e6:.2f} MB of whole numbers"
    )
    console.result(
        f"answers differ by at most {written.nearness.largest:.1e} of the largest from the model's "
        f"own, {written.nearness.mean:.1e} on average, on random tokens in other shapes than the "
        "example's"
    )
    console.result(f"graph: {found.directory}")
