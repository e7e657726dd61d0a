"""The command `benchmark merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_line import Debug, clean_errors


def register(benchmark_app: typer.Typer) -> None:
    """Add the command to the program's benchmarks."""
    benchmark_app.command("merge")(benchmark_merge)


def benchmark_merge(
    flop_top_k: Annotated[
        list[int] | None, typer.Option(help="Experts whose FLOPs are counted; repeatable.")
    ] = None,
    top_k: Annotated[
        list[int] | None, typer.Option(help="Experts whose time is taken; repeatable.")
    ] = None,
    experts: Annotated[int, typer.Option(help="Experts of the layer that is timed.")] = 8,
    d_model: Annotated[int, typer.Option(help="Width of the hidden states.")] = 768,
    expert_size: Annotated[int, typer.Option(help="Neurons of one expert.")] = 3072,
    batch_size: Annotated[int, typer.Option(help="Sequences of one call.")] = 8,
    seq_len: Annotated[
        list[int] | None, typer.Option(help="Tokens of a sequence; repeatable.")
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Time forward and backward.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls of each way.")] = 7,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for merge.json and merge.md.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Count and time merged experts against the plain mixture and a merge for every sequence."""
    with clean_errors(debug=debug):
        from ..benchmarks.merge import MergeBenchmark, main

        main(
            MergeBenchmark(
                d_model=d_model,
                expert_size=expert_size,
                flop_top_ks=tuple(flop_top_k or (1, 2, 4, 8, 16, 32)),
                num_experts=experts,
                time_top_ks=tuple(top_k or (1, 8)),
                batch_size=batch_size,
                seq_lens=tuple(seq_len or (128, 16)),
                backward=backward,
                num_repeats=repeats,
                num_threads=threads,
            ),
            output,
        )
