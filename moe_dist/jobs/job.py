"""What a job is told: the recipe's own sections and a few paths, sent to any worker as they are.

Every path must be one that all workers see; a stage and models may lie at URIs, and are made local
before the job runs (`moe_dist.workers.remote_stage`). Jobs are collective: every rank of the
process group runs the same one. Rank 0 writes into the stage's directory; what `run` returns is
plain values, equal on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moe_dist.config.data_section import TASK_KEYS, DataConfig
from moe_dist.config.sections import ParallelConfig, TrainConfig

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.data.mixture import Rows
    from moe_dist.data.tasks import Split
    from moe_dist.jobs.job_data import AnyJobData


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """What all jobs share.

    Args:
        stage_dir: where rank 0 writes results, checkpoints and the metric log.
        data: the rows.
        max_length: tokens per sample; longer ones are cut.
        seed: of data order, dropout and everything else that is drawn.
        parallel: how workers share the work; their number is the process group's.
        row_seed: draws the rows where it is not `seed` that does.
        cache_dir: where tokenised data is cached; None for the default.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ()
    """Fields that name directories which the job reads."""

    stage_dir: str
    data: DataConfig
    max_length: int
    seed: int
    parallel: ParallelConfig
    row_seed: int | None = None
    cache_dir: str | None = None

    @classmethod
    def of(cls, config: RunConfig, stage_dir: str, **fields: Any) -> Self:
        """Take over what a recipe says; ``fields`` are the job's own, or replace the recipe's."""
        shared: dict[str, Any] = {
            "data": config.data,
            "max_length": config.model.max_length,
            "seed": config.seed,
            "parallel": config.parallel,
        }
        return cls(stage_dir=stage_dir, **(shared | fields))

    def rows(self) -> Rows:
        """Load the rows."""
        from moe_dist.data.mixture import load_rows

        seed = self.seed if self.row_seed is None else self.row_seed
        return load_rows(row_arguments(self.data, seed))

    def tokenised(self, rows: Rows, tokenizer: Any) -> AnyJobData:
        """Join rows with what tokenises them."""
        from moe_dist.jobs.job_data import job_data

        return job_data(rows, tokenizer, max_length=self.max_length, cache_dir=self.cache_dir)

    @abstractmethod
    def run(self) -> Any:
        """Do the work, on every rank alike."""


@dataclass(frozen=True, kw_only=True)
class TrainJob(Job):
    """What jobs that train share.

    Args:
        train: the recipe's section for this model.
        eval_split: what is measured.
        eval_at: further steps to measure after.
        checkpoint_at: further steps to save after.
        keep_predictions: rank 0 writes the answers of the last evaluation.
    """

    TRAINS_ON: ClassVar[Split] = "train"
    """The rows that it learns from."""

    train: TrainConfig
    eval_split: Split = "dev"
    eval_at: tuple[int, ...] = ()
    checkpoint_at: tuple[int, ...] = ()
    keep_predictions: bool = False


def run(job: Job) -> Any:
    """Run a job; what workers are sent beside it."""
    return job.run()


def row_arguments(data: DataConfig, seed: int) -> dict[str, Any]:
    """Return the arguments of `load_rows`; without `tasks` they are those of `load_splits`."""
    values = data.model_dump(mode="json")
    kept = TASK_KEYS if data.source == "tasks" else set(values) - set(TASK_KEYS)
    return {**{key: values[key] for key in values if key in kept}, "seed": seed}
