"""The command `profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_line import Debug, Overrides, Quiet, clean_errors, quieten_libraries


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("profile")(profile)


def profile(
    subject: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|RECIPE", help="A model's directory, or a YAML recipe that distils."
        ),
    ],
    shape: Annotated[
        str | None, typer.Option(help="Of a model: sentences and tokens of a pass; 1x128 if not.")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="Of a model: such as lean-bf16; eager-fp32 if not given.")
    ] = None,
    passes: Annotated[
        int | None, typer.Option(help="Of a model: passes that are timed; 20 if not given.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of a recipe: steps to look at; 5 if not given.")
    ] = None,
    overrides: Overrides = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for profile.json, profile.md and trace.json."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show where a model's pass, or a recipe's distillation step, spends its time."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.errors import ConfigError

        from ..benchmarks.results import check_output

        check_output(output)
        if not subject.exists():
            fault = f"{subject} does not exist; give a model's directory or a recipe"
            raise ConfigError([fault], source="profile")
        if subject.is_dir():
            _refuse({"--steps": steps, "--set": overrides}, "a recipe")
            _profile_model(subject, shape, form, passes, threads, output)
        else:
            _refuse({"--shape": shape, "--form": form, "--passes": passes}, "a model's directory")
            _profile_step(subject, overrides or [], steps, threads, output, quiet=quiet)


def _profile_model(
    directory: Path,
    shape: str | None,
    form: str | None,
    passes: int | None,
    threads: int | None,
    output: Path | None,
) -> None:
    from moe_dist.inference.backends import Form

    from ..benchmarks.profile_model import ModelToProfile, main
    from .shapes import parse_shape

    chosen = ModelToProfile(directory, num_threads=threads)
    main(
        ModelToProfile(
            directory,
            shape=parse_shape(shape, "profile") if shape else chosen.shape,
            form=Form.parse(form) if form else chosen.form,
            num_passes=chosen.num_passes if passes is None else passes,
            num_threads=threads,
        ),
        output,
    )


def _profile_step(
    recipe: Path,
    overrides: list[str],
    steps: int | None,
    threads: int | None,
    output: Path | None,
    *,
    quiet: bool,
) -> None:
    from moe_dist.config import load_config

    from ..chain.chain import run_chain
    from ..chain.stage import StageInputs
    from ..chain.workspace import Workspace
    from ..stages import adapt
    from .run_command import open_console

    config = load_config(recipe, overrides)
    with open_console(quiet=quiet, as_json=False) as console:
        from ..benchmarks.profile_step import NUM_STEPS, check_steps, main

        num_steps = NUM_STEPS if steps is None else steps
        workspace = Workspace(config, console)
        check_steps(workspace, num_steps, threads)
        # What a step needs; finished stages are skipped.
        results = run_chain(config, console, until=adapt.NAME).results
        main(
            config,
            StageInputs(workspace, results),
            num_steps=num_steps,
            num_threads=threads,
            output=output,
        )


def _refuse(given: dict[str, object], subject: str) -> None:
    """Refuse options that say something of another subject."""
    from moe_dist.errors import ConfigError

    faults = [
        f"{name} is an option for {subject}; leave it out"
        for name, value in given.items()
        if value not in (None, [])
    ]
    if faults:
        raise ConfigError(faults, source="profile")
