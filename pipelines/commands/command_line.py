"""What the commands share: options, errors in one message, quiet libraries."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_dist.errors import (
    ConfigError,
    ConversionError,
    DataError,
    MissingInputError,
    MoeDistError,
    TrackingError,
)
from moe_dist.redaction import hide_secrets

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from ..console import Console

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""What holds of a stopped command that says nothing else."""

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting, e.g. moe.top_k=2; may be repeated."
    ),
]
REQUIRE_SPEEDUP = "evaluate.require_speedup"
RequireSpeedup = Annotated[
    float | None,
    typer.Option(
        help="End with an error, after the results are written, unless the student is so many "
        f"times as fast as its teacher at batch 1 and 32; sets {REQUIRE_SPEEDUP}."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe, print the derived sizes, and stop.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and results only.")]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print JSON lines: what happens, and at last the results or the error."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def note_unread_speedup(config: RunConfig, command: str, console: Console) -> None:
    """Say that a command does not look at the speed-up that a recipe requires."""
    if config.evaluate.require_speedup is not None:
        console.warn(f"{command} does not look at {REQUIRE_SPEEDUP}; compress and evaluate do")


def quieten_libraries() -> None:
    """Keep other libraries' bars and hints out of the progress display; workers inherit it.

    MLflow's reports of use to its makers are off too, as Ray's are, unless the user wants them.
    """
    for variable, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        # torch's profiler says on standard error when it starts and stops.
        ("KINETO_LOG_LEVEL", "99"),
    ):
        os.environ.setdefault(variable, value)


@contextmanager
def shown_warnings(console: Console) -> Iterator[None]:
    """Show the library's warnings and notes between the progress lines and not across them."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show = console.warn if record.levelno >= logging.WARNING else console.note
            show(record.getMessage())

    logger = logging.getLogger("moe_dist")
    handler, propagated, level = Handler(), logger.propagate, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagated


@contextmanager
def clean_errors(*, debug: bool, stopped: str = "") -> Iterator[None]:
    """Print a user's error as one message; leave the traceback to --debug.

    Of any other error, which is a fault of the program, the traceback is printed. Credentials
    are taken out of all of it. Ends in a typer.Exit with the error's code.

    Args:
        debug: print the traceback of a user's error.
        stopped: what holds after ctrl-C, of a command that does not continue.
    """
    try:
        yield
    except MoeDistError as error:
        told = traceback.format_exc() if debug else f"error: {error}"
        typer.echo(hide_secrets(told), err=True)
        raise typer.Exit(_exit_code(error)) from None
    except KeyboardInterrupt as stop:
        from ..console import CONTINUES

        typer.echo(f"stopped; {str(stop) or stopped or CONTINUES}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception:
        typer.echo(hide_secrets(traceback.format_exc()), err=True)
        raise typer.Exit(EXIT_FAILURE) from None


def _exit_code(error: MoeDistError) -> int:
    """Tell what the user can mend in recipe or surroundings from what failed on the way."""
    mendable = ConfigError | ConversionError | DataError | MissingInputError | TrackingError
    return EXIT_USER_ERROR if isinstance(error, mendable) else EXIT_FAILURE
