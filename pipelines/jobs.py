"""Runs a worker job for a stage, and shows its metric log while it grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moe_dist.metric_log import MetricRecord

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from .stage import StageWork

Job = Callable[[dict[str, Any]], Any]
LOSS = "train/loss/total"


def run_job(
    job: Job, payload: Mapping[str, Any], *, config: RunConfig, work: StageWork, stage: str
) -> Any:
    """Run a training job on the recipe's workers and show its progress.

    Args:
        job: a function of `moe_dist.training.jobs`.
        payload: what it is told.
        config: the run's configuration; its `parallel` section says where the job runs.
        work: the stage that asks.
        stage: its name with the comparison, which names the Ray run.

    Returns:
        What rank 0's job returned.
    """
    from moe_dist.training.driver import run_on_workers

    parallel = config.parallel
    return run_on_workers(
        job,
        dict(payload),
        num_workers=parallel.num_workers,
        cpus_per_worker=parallel.cpus_per_worker,
        use_gpu=parallel.use_gpu,
        launcher=parallel.launcher,
        max_failures=parallel.max_failures,
        storage_path=work.directory / "ray",
        name=stage.replace("/", "-"),
        metric_log=work.directory / "metrics.jsonl",
        on_poll=progress_callback(work),
    )


def run_here(job: Job, payload: Mapping[str, Any]) -> Any:
    """Run a short job in this process.

    Args:
        job: a function of `moe_dist.training.jobs`.
        payload: what it is told.

    Returns:
        What the job returned.
    """
    return job(dict(payload))


def progress_callback(work: StageWork) -> Callable[[list[MetricRecord]], None]:
    """Return a function that shows and forwards the records a job wrote since the last poll.

    Args:
        work: the stage whose progress it is.

    Returns:
        A function of new metric records.
    """

    def on_poll(records: list[MetricRecord]) -> None:
        for record in records:
            total = record.metrics.get("train/num_steps")
            figures = {"loss": record.metrics[LOSS]} if LOSS in record.metrics else {}
            work.console.progress(record.step, int(total) if total else None, figures)

    return on_poll
