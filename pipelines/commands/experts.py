"""The command `benchmark experts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_line import Debug, clean_errors, quieten_libraries


def register(benchmark_app: typer.Typer) -> None:
    """Add the command to the program's benchmarks."""
    benchmark_app.command("experts")(benchmark_experts)


def benchmark_experts(
    experts: Annotated[
        list[int] | None, typer.Option(help="Experts of a layer; repeatable; 8 and 32.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of one call.")] = 4096,
    d_model: Annotated[int, typer.Option(help="Width of the hidden states.")] = 768,
    expert_size: Annotated[int, typer.Option(help="Neurons of one expert, gated.")] = 768,
    top_k: Annotated[int, typer.Option(help="Experts for each token; 2 at least.")] = 2,
    precision: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; in each all layers are timed once.")] = 7,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for experts.json and experts.md.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Time the MoE layer against that of transformers, in each of its ways and both passes."""
    with clean_errors(debug=debug, stopped="nothing was written"):
        quieten_libraries()
        from ..benchmarks.experts import DTYPES, GOALS, ExpertsBenchmark, main

        main(
            ExpertsBenchmark(
                num_tokens=tokens,
                d_model=d_model,
                expert_size=expert_size,
                num_experts=tuple(experts or GOALS),
                top_k=top_k,
                precisions=tuple(precision or DTYPES),
                num_rounds=rounds,
                num_threads=threads,
            ),
            output,
        )
