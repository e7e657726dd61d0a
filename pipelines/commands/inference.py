"""The command `benchmark inference`, and the options that it shares with `benchmark generation`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command_line import Debug, clean_errors, quieten_libraries

Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=]DIR...", help="Models; ratios are to the first."),
]
Random = Annotated[
    bool,
    typer.Option(
        "--random",
        help="Draw a teacher, a student and a dense student of its active size instead: what "
        "experts could gain here, before anything is trained.",
    ),
]
DModel = Annotated[int | None, typer.Option(help="With --random: width; 768.")]
Layers = Annotated[int | None, typer.Option(help="With --random: layers; 2.")]
Neurons = Annotated[
    int | None, typer.Option(help="With --random: neurons of the teacher's FFN; 3072.")
]
Experts = Annotated[int | None, typer.Option(help="With --random: experts; 4.")]
ExpertSize = Annotated[int | None, typer.Option(help="With --random: neurons of an expert; 768.")]
TopK = Annotated[int | None, typer.Option(help="With --random: of a token; 1.")]
Router = Annotated[
    str | None, typer.Option(help="With --random: the student's router; token_gate.")
]
Forms = Annotated[
    list[str] | None,
    typer.Option(help="A form such as lean-bf16; repeatable; all if not given."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]


def register(benchmark_app: typer.Typer) -> None:
    """Add the command to the program's benchmarks."""
    benchmark_app.command("inference")(benchmark_inference)


def benchmark_inference(
    models: Models = None,
    random: Random = False,
    d_model: DModel = None,
    layers: Layers = None,
    neurons: Neurons = None,
    experts: Experts = None,
    expert_size: ExpertSize = None,
    top_k: TopK = None,
    router: Router = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Sentences and tokens of a pass, such as 1x16; repeatable."),
    ] = None,
    padded: Annotated[
        bool,
        typer.Option(
            "--padded",
            help="Sentences of all lengths, from an eighth of a shape's tokens, padded to them.",
        ),
    ] = False,
    form: Forms = None,
    rounds: Annotated[int, typer.Option(help="Rounds; in each all are timed twice.")] = 15,
    threads: Threads = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for inference.json and inference.md.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Time models in every form that they can answer in, in turn."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.inference.backends import QUICK_FORMS, Form

        from ..benchmarks.forms import named_directories
        from ..benchmarks.inference import SHAPES, InferenceBenchmark, main
        from ..benchmarks.models import RandomModels
        from .shapes import parse_shape

        command = "benchmark inference"
        sizes = random_sizes(
            command,
            is_random=random,
            d_model=d_model,
            num_layers=layers,
            num_neurons=neurons,
            num_experts=experts,
            expert_size=expert_size,
            top_k=top_k,
            router=router,
        )
        main(
            InferenceBenchmark(
                directories=named_directories(models or (), command),
                random=RandomModels(**sizes) if random else None,
                shapes=tuple(parse_shape(text, command) for text in shape) if shape else SHAPES,
                forms=tuple(Form.parse(text) for text in form) if form else QUICK_FORMS,
                num_rounds=rounds,
                num_threads=threads,
                padded=padded,
            ),
            output,
        )


def random_sizes(command: str, *, is_random: bool, **sizes: Any) -> dict[str, Any]:
    """Keep the sizes that were given; a ConfigError if nothing is drawn that they are of."""
    from moe_dist.errors import ConfigError

    from ..benchmarks.models import OPTIONS

    given = {name: size for name, size in sizes.items() if size is not None}
    if given and not is_random:
        raise ConfigError(
            [f"{OPTIONS[name]} says what --random draws; leave it out." for name in given],
            source=command,
        )
    return given
