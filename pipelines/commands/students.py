"""The commands `compact` and `benchmark students`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command_line import (
    Debug,
    Overrides,
    Quiet,
    clean_errors,
    note_unread_speedup,
    quieten_libraries,
    shown_warnings,
)


def register(app: typer.Typer, benchmark_app: typer.Typer) -> None:
    """Add the commands to the program and its benchmarks."""
    app.command("compact")(compact)
    benchmark_app.command("students")(benchmark_students)


def compact(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A student's directory."),
    ],
    num_experts: Annotated[
        int | None, typer.Option("--num-experts", help="Experts of each layer afterwards.")
    ] = None,
    expert_size: Annotated[
        int | None,
        typer.Option(
            "--expert-size",
            min=1,
            help="Neurons that an expert computes for a token afterwards, shared ones included.",
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="What repairs, of the student's depth and width; the student if not given.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="merge: join experts; drop: keep the most used ones.")
    ] = "merge",
    repair_steps: Annotated[
        int, typer.Option(min=0, help="Steps of distillation afterwards; 0 for none.")
    ] = 200,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Distance at which neurons are stored as one.")
    ] = 1e-6,
    output: Annotated[
        Path | None, typer.Option(help="Where results go; beside the student if not given.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Data and losses; that of the student's run if not given.")
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a trained student smaller: fuse neurons, join and prune experts, repair it."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.config import load_config
        from moe_dist.errors import ConfigError

        from ..chain.stage_recovery import stage_of
        from ..console import Console
        from ..stages.compact_settings import CompactSettings
        from ..stages.compaction import compact as run
        from ..stages.compaction import find_recipe, to_table

        faults = []
        if method not in ("merge", "drop"):
            faults.append(f"--method={method} is not known; use merge or drop.")
        if num_experts is None and expert_size is None:
            faults.append("there is nothing to do; give --num-experts, --expert-size or both.")
        if teacher is not None and not repair_steps:
            faults.append("--teacher repairs, and --repair-steps=0 asks for none; leave one out.")
        if faults:
            raise ConfigError(faults, source="compact")
        chosen: Any = method
        config = load_config(recipe or find_recipe(directory), overrides or ())
        console = Console(quiet=quiet)
        note_unread_speedup(config, "compact", console)
        source = directory.absolute()
        above = stage_of(source) or source.parent
        beside = above.parent / _name(num_experts, expert_size)
        settings = CompactSettings(
            directory=source,
            output=(output or beside).absolute(),
            num_experts=num_experts,
            expert_size=expert_size,
            teacher=teacher,
            method=chosen,
            tolerance=tolerance,
            repair_steps=repair_steps,
        )
        with shown_warnings(console):
            result = run(settings, config, console)
        console.result(to_table(result))
        console.result(f"model: {settings.output / 'model'}")


def _name(num_experts: int | None, expert_size: int | None) -> str:
    """compact-2, compact-size-96 or compact-2-size-96."""
    words = ["compact"]
    if num_experts is not None:
        words.append(str(num_experts))
    if expert_size is not None:
        words.append(f"size-{expert_size}")
    return "-".join(words)


def benchmark_students(
    layers: Annotated[int, typer.Option(help="Layers of the student.")] = 4,
    hidden_size: Annotated[int, typer.Option(help="Width of the student.")] = 312,
    intermediate_size: Annotated[int, typer.Option(help="Neurons of its layers.")] = 1200,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Sentences of one pass; repeatable.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sentence.")] = 128,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 9,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    debug: Debug = False,
) -> None:
    """Time a small student against BERT-base, both with random weights."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from ..benchmarks.students import StudentBenchmark, main

        main(
            StudentBenchmark(
                num_layers=layers,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                batch_sizes=tuple(batch_size or (1, 32)),
                seq_len=seq_len,
                num_repeats=repeats,
                num_threads=threads,
            )
        )
