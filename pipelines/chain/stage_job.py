"""Runs a worker job for a stage, and shows its metric log while it grows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import StorageError
from moe_dist.metric_log import METRIC_LOG, MetricLog, MetricRecord, MetricTail
from moe_dist.timeline import mark

from ..checks.readiness import check_cluster_once
from .stage import StageOutcome

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.jobs.job import Job, TrainJob

    from ..console import Console
    from .stage import StageWork
    from .workspace import Workspace

SHOWN = {"train/loss/total": "loss", "perf/tokens_per_s": "tokens/s"}
DEV_PREFIX = "dev/"
LOSS_PREFIX = "train/loss/"
RAY_DIRECTORY = "ray"
MAX_TAG_LENGTH = 5000
TRAINING_SCRATCH = ("checkpoints",)
"""Where a training job can continue from; three times its model each, and of no use afterwards."""
TRAINING_FACTS = ("num_steps", "resumed_from", "peak_memory_gib", "peak_device_memory_gib")
"""What a training stage keeps of its job's summary, beside the metrics; the last is of GPUs."""


def run_job(
    job: Job,
    *,
    config: RunConfig,
    work: StageWork,
    workspace: Workspace,
    num_steps: int | None = None,
    alone: bool = False,
) -> Any:
    """Run a job on the recipe's workers and show its progress.

    Args:
        job: what workers are asked to do.
        config: the run's configuration; its `parallel` section says where the job runs.
        work: the stage that asks.
        workspace: holds the chain's connection to Ray.
        num_steps: steps that the job takes, where it takes steps.
        alone: one of the workers does it all, since the job cannot be shared.

    Returns:
        What rank 0's job returned.
    """
    from moe_dist.jobs.job import run
    from moe_dist.workers.driver import run_on_workers
    from moe_dist.workers.worker_cpus import worker_cpus

    check_cluster_once(config, workspace)
    mark("checks, data and imports of the driver")
    parallel, files = config.parallel, workspace.files
    if alone:
        parallel = parallel.model_copy(update={"num_workers": 1})
    log, records = work.directory / METRIC_LOG, work.directory / RAY_DIRECTORY
    shows = (
        show_progress(log, work.console, num_steps),
        show_failures(records, work.console),
    )

    def on_poll() -> None:
        files.refresh(log, records)
        for show in shows:
            show()

    try:
        result = run_on_workers(
            run,
            job,
            num_workers=parallel.num_workers,
            cpus_per_worker=worker_cpus(parallel),
            use_gpu=None if parallel.use_gpu == "auto" else parallel.use_gpu,
            launcher=parallel.launcher,
            max_failures=parallel.max_failures,
            step_timeout_s=config.train.step_timeout_s,
            wait_s=parallel.wait_s,
            storage_path=files.address(work.directory),
            name=RAY_DIRECTORY,
            on_poll=on_poll,
            session=workspace.session,
        )
    except BaseException:
        with suppress(StorageError):  # The error that ended the job is the one to show.
            files.received(work.directory)
        raise
    files.received(work.directory)
    if result.restarts:
        reasons = "\n".join(str(restart) for restart in result.restarts)[:MAX_TAG_LENGTH]
        work.run.set_tags({"restarts": str(len(result.restarts)), "restart_reasons": reasons})
    if len(set(result.world_sizes)) > 1:
        sizes = ", then ".join(str(size) for size in result.world_sizes)
        work.console.warn(f"the number of workers changed: {sizes}")
    return result.value


def run_training(
    job: TrainJob, *, config: RunConfig, work: StageWork, workspace: Workspace, title: str
) -> StageOutcome:
    """Run a stage's training job; with no epochs it keeps its model as it is, which is short.

    Args:
        job: what trains, or keeps.
        config: the run's configuration.
        work: the stage that asks.
        workspace: holds the rows.
        title: of the picture of the losses.

    Returns:
        The model's directory and what the job found.
    """
    is_kept = job.train.num_epochs == 0
    result = run_job(
        job,
        config=placed_here(config) if is_kept else config,
        work=work,
        workspace=workspace,
        num_steps=None if is_kept else workspace.num_steps(job.train, job.TRAINS_ON),
    )
    loads = result["expert_load"]
    plots = () if is_kept else (draw_losses(work, title), *draw_load(work, loads))
    return StageOutcome(
        outputs={"model": work.directory / "model"},
        metrics=result["metrics"],
        details={key: result[key] for key in TRAINING_FACTS if key in result},
        plots=plots,
    )


def show_failures(records: Path, console: Console) -> Callable[[], None]:
    """Return a function that tells of workers that failed and run again since its last call."""
    from moe_dist.workers.attempts import read_restarts

    failed: set[int] = set()
    over: set[int] = set()

    def on_poll() -> None:
        for restart in read_restarts(records):
            if restart.attempt not in failed:
                failed.add(restart.attempt)
                console.warn(f"workers failed: {restart.reason or 'one died'}")
            if restart.is_over and restart.attempt not in over:
                over.add(restart.attempt)
                console.note(f"workers run again after {restart.timing}")

    return on_poll


def placed_here(config: RunConfig) -> RunConfig:
    """Place a short job in this process where that is as good as the recipe's workers.

    Starting a group of workers takes Ray some 15 seconds, which is most of a job that is over
    in 20. Where the workers would share this machine's CPUs anyway, one process with all of
    their threads does the same work; on a cluster (`RAY_ADDRESS`) and on GPUs the workers are
    as many machines or devices, and stay. So they do with `parallel.launcher=ray`.
    """
    import torch

    from moe_dist.workers.ray_session import available_cpus

    parallel = config.parallel
    wants_gpu = parallel.use_gpu is True or (
        parallel.use_gpu == "auto" and torch.cuda.is_available()
    )
    if os.environ.get("RAY_ADDRESS") or wants_gpu or parallel.launcher != "auto":
        return config
    here: dict[str, Any] = {"launcher": "local", "num_workers": 1}
    if parallel.cpus_per_worker != "auto":
        num_threads = min(parallel.max_workers * parallel.cpus_per_worker, available_cpus())
        here["cpus_per_worker"] = num_threads
    return config.model_copy(update={"parallel": parallel.model_copy(update=here)})


def draw_losses(work: StageWork, title: str) -> Path:
    """Draw the loss terms that a training job logged, and return the picture."""
    from ..report.plots import plot_losses

    records = MetricLog(work.directory / METRIC_LOG).read()
    return plot_losses(records, work.directory / "losses.png", title=title)


def draw_load(work: StageWork, loads: Mapping[str, Sequence[float]]) -> tuple[Path, ...]:
    """Draw the experts' load at the end of a training job; no picture for a dense model."""
    from ..report.plots import plot_expert_load

    return (plot_expert_load(loads, work.directory / "expert-load.png"),) if loads else ()


def show_progress(log: Path, console: Console, num_steps: int | None) -> Callable[[], None]:
    """Return a function that shows what was written to a job's metric log since its last call."""
    tail = MetricTail(log)
    figures: dict[str, float] = {}
    terms: dict[str, float] = {}

    def on_poll() -> None:
        shown_step: int | None = None
        for record in tail.poll():
            if new := shown_figures(record):
                figures.update(new)
                terms.update(loss_terms(record))
                shown_step = record.step
        # A log that is continued comes whole at first; its old lines took no time now.
        if shown_step is not None:
            console.progress(shown_step, num_steps, figures, terms)

    return on_poll


def shown_figures(record: MetricRecord) -> dict[str, float]:
    """Pick loss and speed, or the main dev metric, for the progress line; empty for other lines."""
    metrics = record.metrics
    chosen = {label: metrics[name] for name, label in SHOWN.items() if name in metrics}
    # The job writes the task's main metric first.
    main = next((name for name in metrics if name.startswith(DEV_PREFIX)), None)
    if main is not None:
        chosen[f"dev {main.removeprefix(DEV_PREFIX)}"] = metrics[main]
    return chosen


def loss_terms(record: MetricRecord) -> dict[str, float]:
    """Pick what the loss is made of; empty where it is one term, or not there."""
    terms = {
        name.removeprefix(LOSS_PREFIX).replace("_", " "): value
        for name, value in record.metrics.items()
        if name.startswith(LOSS_PREFIX) and name not in SHOWN
    }
    return terms if len(terms) > 1 else {}
