"""The command `benchmark generation`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_line import Debug, clean_errors, quieten_libraries
from .inference import (
    DModel,
    Experts,
    ExpertSize,
    Forms,
    Layers,
    Models,
    Neurons,
    Random,
    Router,
    Threads,
    TopK,
    random_sizes,
)


def register(benchmark_app: typer.Typer) -> None:
    """Add the command to the program's benchmarks."""
    benchmark_app.command("generation")(benchmark_generation)


def benchmark_generation(
    models: Models = None,
    random: Random = False,
    d_model: DModel = None,
    layers: Layers = None,
    neurons: Neurons = None,
    experts: Experts = None,
    expert_size: ExpertSize = None,
    top_k: TopK = None,
    router: Router = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Texts written at once; repeatable; 1 and 8.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens written to each text.")] = 32,
    prompt: Annotated[int, typer.Option(help="Tokens of each text before them.")] = 32,
    prefill: Annotated[
        int, typer.Option(help="Tokens of the one prompt whose reading is timed by itself.")
    ] = 128,
    form: Forms = None,
    rounds: Annotated[int, typer.Option(help="Rounds; in each all are timed.")] = 5,
    threads: Threads = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for generation.json and generation.md.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Time how decoders write texts in every form that they have, in turn."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.inference.backends import QUICK_FORMS, Form

        from ..benchmarks.forms import named_directories
        from ..benchmarks.generation import GenerationBenchmark, main
        from ..benchmarks.models import RandomDecoders

        command = "benchmark generation"
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
            GenerationBenchmark(
                directories=named_directories(models or (), command),
                random=RandomDecoders(**sizes) if random else None,
                batch_sizes=tuple(batch or (1, 8)),
                prompt_len=prompt,
                num_new_tokens=tokens,
                prefill_len=prefill,
                forms=tuple(Form.parse(text) for text in form) if form else QUICK_FORMS,
                num_rounds=rounds,
                num_threads=threads,
            ),
            output,
        )
