"""The command `benchmark inference`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_line import Debug, clean_errors, quieten_libraries


def register(benchmark_app: typer.Typer) -> None:
    """Add the command to the program's benchmarks."""
    benchmark_app.command("inference")(benchmark_inference)


def benchmark_inference(
    models: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]DIR...", help="Models; ratios are to the first."),
    ],
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Sentences and tokens of a pass, such as 1x16; repeatable."),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(help="A form such as lean-bf16; repeatable; all if not given."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; in each all are timed twice.")] = 15,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for inference.json and inference.md.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Time models in every form that they can answer in, in turn."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.inference.backends import ALL_FORMS, Form

        from ..benchmarks.inference import SHAPES, InferenceBenchmark, main, named_directories
        from .shapes import parse_shape

        main(
            InferenceBenchmark(
                directories=named_directories(models),
                shapes=tuple(parse_shape(text, "benchmark inference") for text in shape)
                if shape
                else SHAPES,
                forms=tuple(Form.parse(text) for text in form) if form else ALL_FORMS,
                num_rounds=rounds,
                num_threads=threads,
            ),
            output,
        )
