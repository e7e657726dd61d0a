"""The command `export`: one task's sub-network as a plain dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_line import Debug, Quiet, clean_errors, quieten_libraries, shown_warnings


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
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Take one task's sub-network out of a model, as a plain dense Hugging Face model."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from ..console import Console
        from ..stages.export import default_output, export_task

        console = Console(quiet=quiet)
        source = directory.absolute()
        with shown_warnings(console):
            found = export_task(source, task, (output or default_output(source, task)).absolute())
        console.result(
            f"{found.kind}, {found.num_parameters:,} parameters, {found.ffn_size} neurons in each "
            f"feed-forward layer; its outputs differ by at most {found.difference:.1e}"
        )
        console.result(f"model: {found.directory}")
