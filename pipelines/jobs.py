"""Runs a worker job for a stage, and shows its metric log while it grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.metric_log import MetricLog, MetricTail

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from .console import Console
    from .stage import StageWork
    from .workspace import Workspace

Job = Callable[[Any], Any]
LOSS = "train/loss/total"
METRIC_LOG = "metrics.jsonl"
RAY_DIRECTORY = "ray"
TRAINING_SCRATCH = ("checkpoints",)
"""Where a training job can continue from; three times its model each, and of no use afterwards."""
TRAINING_FACTS = ("num_steps", "resumed_from", "peak_memory_gib")
"""What a training stage keeps of its job's summary, beside the metrics."""


def run_job(
    job: Job,
    payload: Mapping[str, Any],
    *,
    config: RunConfig,
    work: StageWork,
    workspace: Workspace,
    num_steps: int | None = None,
) -> Any:
    """Run a job on the recipe's workers and show its progress.

    Args:
        job: a function of `moe_dist.training.jobs`.
        payload: what it is told.
        config: the run's configuration; its `parallel` section says where the job runs.
        work: the stage that asks.
        workspace: holds the chain's connection to Ray.
        num_steps: steps that the job takes, where it takes steps.

    Returns:
        What rank 0's job returned.
    """
    from moe_dist.training.driver import run_on_workers

    parallel = config.parallel
    result = run_on_workers(
        job,
        dict(payload),
        num_workers=parallel.num_workers,
        cpus_per_worker=parallel.cpus_per_worker,
        use_gpu=None if parallel.use_gpu == "auto" else parallel.use_gpu,
        launcher=parallel.launcher,
        max_failures=parallel.max_failures,
        storage_path=work.directory,
        name=RAY_DIRECTORY,
        on_poll=show_progress(work.directory / METRIC_LOG, work.console, num_steps),
        session=workspace.session,
    )
    if result.num_attempts > 1:
        work.console.warn(f"workers died and were started again {result.num_attempts - 1} times")
    return result.value


def draw_losses(work: StageWork, title: str) -> Path:
    """Draw the loss terms that a training job logged.

    Args:
        work: the stage that ran it.
        title: the heading.

    Returns:
        The picture.
    """
    from .plots import plot_losses

    records = MetricLog(work.directory / METRIC_LOG).read()
    return plot_losses(records, work.directory / "losses.png", title=title)


def show_progress(log: Path, console: Console, num_steps: int | None) -> Callable[[], None]:
    """Return a function that shows what a job wrote to its metric log since the last call.

    Args:
        log: the job's metric log.
        console: where to show it.
        num_steps: steps in all, where known.

    Returns:
        A function without arguments, to be called now and then.
    """
    tail = MetricTail(log)

    def on_poll() -> None:
        for record in tail.poll():
            if LOSS in record.metrics:
                console.progress(record.step, num_steps, {"loss": record.metrics[LOSS]})

    return on_poll
