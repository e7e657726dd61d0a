"""The command line: `moe-dist COMMAND` and `python -m pipelines COMMAND`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .commands.command_line import (
    EXIT_FAILURE,
    REQUIRE_SPEEDUP,
    AsJson,
    Debug,
    DryRun,
    Overrides,
    Quiet,
    Recipe,
    RequireSpeedup,
    clean_errors,
    quieten_libraries,
    shown_warnings,
)
from .commands.comparison import register as register_comparison
from .commands.experts import register as register_experts
from .commands.export import register as register_export
from .commands.generation import register as register_generation
from .commands.inference import register as register_inference
from .commands.merging import register as register_merging
from .commands.profile import register as register_profile
from .commands.run_command import run_until
from .commands.search import register as register_search
from .commands.serve import register as register_serve
from .commands.students import register as register_students

app = typer.Typer(
    name="moe-dist",
    help="Turn a dense Transformer into a distilled mixture of experts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
benchmark_app = typer.Typer(
    help="Measure parts of the program on this machine.", no_args_is_help=True
)
app.add_typer(benchmark_app, name="benchmark")
register_comparison(app, benchmark_app)
register_export(app)
register_profile(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from moe_dist import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Turn a dense Transformer into a distilled mixture of experts."""


_CHAIN_COMMANDS = (
    (
        "compress",
        "evaluate",
        "Run the whole chain: teacher, scores, experts, distillation, report.",
    ),
    ("finetune-teacher", "finetune-teacher", "Fine-tune the dense teacher on the task."),
    (
        "score-importance",
        "score-importance",
        "Score the teacher's feed-forward neurons, after the stages before it.",
    ),
    ("shrink", "shrink", "Cut a smaller student from the teacher, after the stages before it."),
    ("adapt", "adapt", "Split the teacher into experts, after the stages before it."),
    ("distill", "distill", "Distil the teacher into the student, after the stages before it."),
    (
        "evaluate",
        "evaluate",
        "Measure teacher and students and write the report, after the stages before it.",
    ),
)
"""Name, last stage to run, and help."""


def _add_chain_command(name: str, until: str, summary: str) -> None:
    if until == "evaluate":
        _add_evaluating_command(name, summary)
        return

    @app.command(name, help=summary)
    def run(
        recipe: Recipe,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        quiet: Quiet = False,
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        run_until(
            until,
            recipe,
            overrides,
            dry_run=dry_run,
            quiet=quiet,
            as_json=as_json,
            debug=debug,
        )


def _add_evaluating_command(name: str, summary: str) -> None:
    @app.command(name, help=summary)
    def run(
        recipe: Recipe,
        overrides: Overrides = None,
        require_speedup: RequireSpeedup = None,
        dry_run: DryRun = False,
        quiet: Quiet = False,
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        wanted = [] if require_speedup is None else [f"{REQUIRE_SPEEDUP}={require_speedup}"]
        run_until(
            "evaluate",
            recipe,
            [*(overrides or ()), *wanted],
            dry_run=dry_run,
            quiet=quiet,
            as_json=as_json,
            debug=debug,
        )


for _name, _until, _summary in _CHAIN_COMMANDS:
    _add_chain_command(_name, _until, _summary)


@app.command()
def preflight(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Check a recipe and the cluster before a long run: workers, versions, storage, network."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from moe_dist.config import load_config

        from .console import Console

        config = load_config(recipe, overrides or ())
        console = Console(quiet=as_json)
        from .checks.preflight import run_preflight

        with shown_warnings(console):
            is_ready = run_preflight(config, console, as_json=as_json)
        if not is_ready:
            raise typer.Exit(EXIT_FAILURE)


@app.command()
def submit(
    recipe: Recipe,
    address: Annotated[
        str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")
    ],
    overrides: Overrides = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files not to send, as in .gitignore; repeatable."),
    ] = None,
    max_package_mib: Annotated[
        int, typer.Option(min=1, help="The largest working directory to send.")
    ] = 100,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not follow the job; say how to.")
    ] = False,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job too.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the whole chain as a job on a Ray cluster, and follow it."""
    with clean_errors(debug=debug):
        quieten_libraries()
        from .chain.workspace import Workspace
        from .checks.cluster_package import cluster_module
        from .checks.preflight import check_before_submit
        from .console import Console

        console = Console(quiet=quiet)
        module = cluster_module("submit")
        with shown_warnings(console):
            code = module.submit(
                module.Submission(
                    recipe,
                    tuple(overrides or ()),
                    address,
                    excludes=tuple(exclude or ()),
                    max_package_mib=max_package_mib,
                    wait=not no_wait,
                    stop_on_interrupt=stop_on_interrupt,
                ),
                check=lambda config: check_before_submit(config, Workspace(config, console)),
                say=console.note,
                write=console.output,
            )
    raise typer.Exit(code)


@benchmark_app.command("layer")
def benchmark_layer(
    tokens: Annotated[int, typer.Option(help="Tokens of one call.")] = 4096,
    d_model: Annotated[int, typer.Option(help="Width of the hidden states.")] = 768,
    experts: Annotated[int, typer.Option(help="Experts of the layer.")] = 4,
    expert_size: Annotated[int, typer.Option(help="Neurons of one expert.")] = 768,
    top_k: Annotated[int, typer.Option(help="Experts for each token.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed calls of each layer.")] = 9,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; repeatable.")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Time the gradient too.")] = False,
    debug: Debug = False,
) -> None:
    """Time the MoE layer against a dense layer of the same active FLOPs."""
    with clean_errors(debug=debug):
        from .benchmarks.layer import LayerBenchmark, main

        main(
            LayerBenchmark(
                num_tokens=tokens,
                d_model=d_model,
                num_experts=experts,
                expert_size=expert_size,
                top_k=top_k,
                precisions=tuple(precision or ("fp32", "bf16")),
                num_repeats=repeats,
                num_threads=threads,
                backward=backward,
            )
        )


@benchmark_app.command("gpu")
def benchmark_gpu(
    tokens: Annotated[int, typer.Option(help="Tokens of a layer's call.")] = 4096,
    repeats: Annotated[int, typer.Option(help="Timed calls, and timed steps.")] = 20,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/results/gpu.md"),
    debug: Debug = False,
) -> None:
    """Measure layers, waits and steps on this machine's GPU, and write a page of it."""
    with clean_errors(debug=debug):
        from .benchmarks.gpu import GpuBenchmark, main

        main(GpuBenchmark(num_tokens=tokens, num_repeats=repeats, out=out))


@benchmark_app.command("importance")
def benchmark_importance(
    mean_tokens: Annotated[
        list[float] | None, typer.Option(help="Mean length of the sentences; repeatable.")
    ] = None,
    spread: Annotated[
        float, typer.Option(help="Standard deviation of the lengths' logarithms.")
    ] = 0.45,
    min_tokens: Annotated[int, typer.Option(help="Length of the shortest sentences.")] = 6,
    max_tokens: Annotated[int, typer.Option(help="Length of the longest sentences.")] = 64,
    samples: Annotated[int, typer.Option(help="Sentences for the scorer.")] = 512,
    looped: Annotated[int, typer.Option(help="How many of these the loops get.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Sentences of one batch.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed passes of each way.")] = 3,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    debug: Debug = False,
) -> None:
    """Time importance scoring against the loop over single samples."""
    with clean_errors(debug=debug):
        from .benchmarks.importance import ImportanceBenchmark, main

        main(
            *(
                ImportanceBenchmark(
                    num_samples=samples,
                    num_looped=looped,
                    batch_size=batch_size,
                    mean_tokens=mean,
                    spread=spread,
                    min_tokens=min_tokens,
                    max_tokens=max_tokens,
                    num_repeats=repeats,
                    num_threads=threads,
                )
                for mean in mean_tokens or (27.0,)
            )
        )


@benchmark_app.command("checkpoint")
def benchmark_checkpoint(
    workers: Annotated[list[int] | None, typer.Option(help="Workers; repeatable.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps of the budget.")] = 250,
    checkpoints: Annotated[int, typer.Option(help="Checkpoints of each run.")] = 5,
    directory: Annotated[
        Path | None, typer.Option(help="Where to write, on the disk to be measured.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Time what checkpoints cost the training beside them."""
    with clean_errors(debug=debug):
        from .benchmarks.checkpoint import CheckpointBenchmark, main

        main(
            CheckpointBenchmark(
                num_workers=tuple(workers or (1, 2)),
                checkpoint_every=checkpoint_every,
                num_checkpoints=checkpoints,
                directory=directory,
            )
        )


@benchmark_app.command("expert-parallel")
def benchmark_expert_parallel(
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = 2048,
    d_model: Annotated[int, typer.Option(help="Width of the hidden states.")] = 768,
    experts: Annotated[int, typer.Option(help="Experts over all ranks.")] = 8,
    expert_size: Annotated[int, typer.Option(help="Neurons of one expert.")] = 768,
    load: Annotated[
        list[int] | None, typer.Option(help="Times the others' share that one expert draws.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of each layer.")] = 15,
    debug: Debug = False,
) -> None:
    """Time the expert-parallel layer against DeepSpeed's own, on two processes."""
    with clean_errors(debug=debug):
        from .benchmarks.expert_parallel import ExpertParallelBenchmark, main

        main(
            ExpertParallelBenchmark(
                num_tokens=tokens,
                d_model=d_model,
                expert_size=expert_size,
                num_experts=experts,
                loads=tuple(load or (1, 4, 8)),
                num_repeats=repeats,
            )
        )


@benchmark_app.command("throughput")
def benchmark_throughput(
    batch_size: Annotated[int, typer.Option(help="Sentences of one worker in a step.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps of one turn.")] = 4,
    repeats: Annotated[int, typer.Option(help="Turns that count.")] = 5,
    ep_size: Annotated[int, typer.Option(help="1 or 2.")] = 2,
    zero_stage: Annotated[int, typer.Option(help="0, 1 or 2.")] = 0,
    skewed: Annotated[
        bool, typer.Option("--skewed", help="Send most tokens to the second half of the experts.")
    ] = False,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="Place experts by number and not by load.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Time two workers against two independent runs on this machine."""
    with clean_errors(debug=debug):
        from .benchmarks.throughput import ThroughputBenchmark, main

        main(
            ThroughputBenchmark(
                batch_size=batch_size,
                num_steps=steps,
                num_repeats=repeats,
                ep_size=ep_size,
                zero_stage=zero_stage,
                skewed=skewed,
                in_order=in_order,
            )
        )


@benchmark_app.command("startup")
def benchmark_startup(
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe that trains on Ray; the demo if not given.")
    ] = None,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(help="Starts that count.")] = 2,
    debug: Debug = False,
) -> None:
    """Time the way from `compress` to the first training step."""
    with clean_errors(debug=debug):
        from .benchmarks.startup import DEMO, StartupBenchmark, main

        main(
            StartupBenchmark(
                recipe=recipe or DEMO, overrides=tuple(overrides or ()), num_repeats=repeats
            )
        )


register_students(app, benchmark_app)
register_experts(benchmark_app)
register_merging(benchmark_app)
register_inference(benchmark_app)
register_generation(benchmark_app)
register_search(app, benchmark_app)
register_serve(app, benchmark_app)


def main() -> None:
    """Run the program; the entry point of `moe-dist`."""
    app()
