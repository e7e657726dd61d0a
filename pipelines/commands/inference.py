"""The command `benchmark inference`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command_line import Debug, clean_errors, quieten_libraries


def register(benchmark_app: typer.Typer) -> None:
    """Add the command to the program's benchmarks."""
    benchmark_app.command("inference")(benchmark_inference)


def benchmark_inference(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]DIR...", help="Models; ratios are to the first."),
    ] = None,
    random: Annotated[
        bool,
        typer.Option(
            "--random",
            help="Draw a teacher, a student and a dense student of its active size instead: what "
            "experts could gain here, before anything is trained.",
        ),
    ] = False,
    d_model: Annotated[int | None, typer.Option(help="With --random: width; 768.")] = None,
    layers: Annotated[int | None, typer.Option(help="With --random: layers; 2.")] = None,
    neurons: Annotated[
        int | None, typer.Option(help="With --random: neurons of the teacher's FFN; 3072.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="With --random: experts; 4.")] = None,
    expert_size: Annotated[
        int | None, typer.Option(help="With --random: neurons of an expert; 768.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="With --random: of a token; 1.")] = None,
    router: Annotated[
        str | None, typer.Option(help="With --random: the student's router; token_gate.")
    ] = None,
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
        from moe_dist.errors import ConfigError
        from moe_dist.inference.backends import QUICK_FORMS, Form

        from ..benchmarks.inference import SHAPES, InferenceBenchmark, main, named_directories
        from ..benchmarks.models import OPTIONS, RandomModels
        from .shapes import parse_shape

        sizes = {
            "d_model": d_model,
            "num_layers": layers,
            "num_neurons": neurons,
            "num_experts": experts,
            "expert_size": expert_size,
            "top_k": top_k,
            "router": router,
        }
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        if given and not random:
            raise ConfigError(
                [f"{OPTIONS[name]} says what --random draws; leave it out." for name in given],
                source="benchmark inference",
            )
        main(
            InferenceBenchmark(
                directories=named_directories(models or ()),
                random=RandomModels(**given) if random else None,
                shapes=tuple(parse_shape(text, "benchmark inference") for text in shape)
                if shape
                else SHAPES,
                forms=tuple(Form.parse(text) for text in form) if form else QUICK_FORMS,
                num_rounds=rounds,
                num_threads=threads,
            ),
            output,
        )
