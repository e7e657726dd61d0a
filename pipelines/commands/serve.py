"""The command `serve`, and `benchmark serving`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command_line import Debug, Quiet, clean_errors, quieten_libraries, shown_warnings

DIRECTORY = typer.Argument(metavar="DIR", help="A model's directory.")
Form = Annotated[
    str,
    typer.Option(
        help="A form such as lean-bf16; auto takes the fastest where the replica runs, also int8."
    ),
]
Task = Annotated[str | None, typer.Option(help="The task; not needed for a model of one task.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads of a replica; if not given, all cores but one, shared out."
    ),
]
Replicas = Annotated[int, typer.Option(min=1, help="Copies of the model.")]
MaxBatchSize = Annotated[
    int, typer.Option(min=1, max=256, help="Texts in a call of the model at most.")
]
MaxWait = Annotated[
    float,
    typer.Option(
        "--max-wait-ms", min=0, max=10_000, help="How long an idle model waits for more texts."
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens after which a text is cut; those of the recipe, else 512."),
]


def register(app: typer.Typer, benchmark_app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("serve")(serve)
    benchmark_app.command("serving")(benchmark_serving)


def serve(
    directory: Annotated[str, DIRECTORY],
    form: Form = "auto",
    task: Task = None,
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone if not given.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of HTTP.")] = 8000,
    metrics_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of the metrics, of a Ray that is started here.")
    ] = 8080,
    replicas: Replicas = 1,
    threads: Threads = None,
    max_batch_size: MaxBatchSize = 32,
    max_wait_ms: MaxWait = 0.0,
    max_length: MaxLength = None,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts of a request at most.")] = 256,
    max_body_kib: Annotated[int, typer.Option(min=1, help="Of a request's body at most.")] = 1024,
    max_characters: Annotated[int, typer.Option(min=1, help="Of one text at most.")] = 100_000,
    max_ongoing: Annotated[
        int, typer.Option(min=1, help="Requests that a replica takes at once.")
    ] = 64,
    max_queued: Annotated[
        int,
        typer.Option(min=1, help="Requests that wait for a replica; more are answered with 503."),
    ] = 256,
    reload: Annotated[
        bool,
        typer.Option("--reload", help="Put the model in the place of one that is served already."),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer texts over HTTP, on Ray Serve; SIGHUP loads the directory anew, ctrl-C stops."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.serving.session import Endpoint, usual_threads

        from ..console import Console
        from ..serving.run import Serving, run

        console = Console(quiet=quiet)
        values: dict[str, Any] = {
            "form": form,
            "task": task,
            "replicas": replicas,
            "threads": threads or usual_threads(replicas),
            "max_batch_size": max_batch_size,
            "max_wait_ms": max_wait_ms,
            "max_texts": max_texts,
            "max_body_bytes": max_body_kib * 1024,
            "max_characters": max_characters,
            "max_ongoing_requests": max_ongoing,
            "max_queued_requests": max_queued,
        }
        with shown_warnings(console):
            run(
                Serving(directory, values, max_length, Endpoint(host, port, metrics_port)),
                console,
                reload=reload,
            )


def benchmark_serving(
    directory: Annotated[str, DIRECTORY],
    form: Form = "auto",
    task: Task = None,
    clients: Annotated[int, typer.Option(help="Clients that each wait for their answer.")] = 8,
    requests: Annotated[int, typer.Option(help="Requests of all clients together.")] = 10_000,
    texts: Annotated[int, typer.Option(help="Texts of a request.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Of the longest texts.")] = 128,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of HTTP.")] = 8000,
    threads: Threads = None,
    max_batch_size: MaxBatchSize = 32,
    max_wait_ms: MaxWait = 0.0,
    output: Annotated[
        Path | None, typer.Option(help="Directory for serving.json and serving.md.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Load a served model with clients on this machine, reload it meanwhile, and compare."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.serving.session import usual_threads

        from ..benchmarks.serving import ServingBenchmark, main
        from ..console import Console

        console = Console(quiet=quiet)
        with shown_warnings(console):
            main(
                ServingBenchmark(
                    directory=directory,
                    form=form,
                    task=task,
                    num_clients=clients,
                    num_requests=requests,
                    num_texts=texts,
                    max_tokens=max_tokens,
                    port=port,
                    num_threads=threads or usual_threads(1),
                    max_batch_size=max_batch_size,
                    max_wait_ms=max_wait_ms,
                ),
                console,
                output,
            )
